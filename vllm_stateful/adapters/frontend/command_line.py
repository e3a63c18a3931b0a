# SPDX-License-Identifier: Apache-2.0
"""The flags of ``vllm serve MODEL --plugin stateful --stateful-...``, and what they set."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

from vllm import envs
from vllm.logger import init_logger

from vllm_stateful.adapters.activation import activate
from vllm_stateful.adapters.fit import off_reason, problems, report_problem
from vllm_stateful.adapters.frontend.draft_options import take_drafts
from vllm_stateful.config import (
    ENABLE_ENV,
    OPTIONS,
    Option,
    is_enabled,
    write_option,
)
from vllm_stateful.errors import ConfigError, StatefulError

logger = init_logger("vllm.stateful")

PLUGIN_NAME = "stateful"
USAGE_OPTION = "enable_prompt_tokens_details"
GENERAL_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
    "vllm.lora_resolver_plugins",
)
ENDPOINT_GROUP = "vllm.endpoint_plugins"


def extend_parser(parser: argparse.ArgumentParser) -> None:
    """Hook of ``cli-flags``: add ``--plugin`` and one flag per option."""
    if any(action.dest == "plugin" for action in parser._actions):
        return
    group = parser.add_argument_group(
        title="StatefulPlugin",
        description="Stateful agent sessions: KV that lives across turns (vllm-stateful).",
    )
    group.add_argument(
        "--plugin",
        action=_EnablePlugin,
        metavar="NAME",
        help="Serve with this plugin; 'stateful' keeps the KV of agent sessions across turns.",
    )
    for option in OPTIONS:
        group.add_argument(option.flag, **_argument(option))
    _truthful_usage(parser)
    _at_the_end(parser, take_drafts)
    if is_enabled() and off_reason() is None:
        _allow_endpoint_plugin()


def options_help() -> str:
    """The help text of the plugin's options, as ``vllm serve --help=StatefulPlugin`` shows it."""
    parser = argparse.ArgumentParser(
        prog="vllm serve",
        add_help=False,
        usage=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=96),
    )
    extend_parser(parser)
    return parser.format_help().strip()


class _NotGiven(int):
    """A value like False, which means that the user has not given the option."""


def _truthful_usage(parser: argparse.ArgumentParser) -> None:
    """Turn ``usage.prompt_tokens_details.cached_tokens`` on with the plugin, unless given."""
    if any(action.dest == USAGE_OPTION for action in parser._actions):
        is_on = is_enabled() and off_reason() is None
        is_on &= not envs.VLLM_USE_RUST_FRONTEND  # the Rust frontend gets what is not a default
        parser.set_defaults(**{USAGE_OPTION: True if is_on else _NotGiven()})


def _at_the_end(
    parser: argparse.ArgumentParser, change: Callable[[argparse.Namespace], None]
) -> None:
    """Let ``change`` see the namespace once the whole command line was read.

    vLLM also reads a command line without any words, to log what differs from the defaults. That
    one is left alone.
    """
    parse = parser.parse_known_args

    def parse_known_args(
        args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        read, unknown = parse(args, namespace)
        if args is None or len(args):
            change(read)
        return read, unknown

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]


def _argument(option: Option) -> dict[str, Any]:
    common = {"option": option, "help": option.help, "default": argparse.SUPPRESS}
    if option.is_flag:
        return {"action": _SetFlag, "nargs": 0, **common}
    return {"action": _SetOption, "metavar": "VALUE", **common}


class _EnablePlugin(argparse.Action):
    """The action of ``--plugin NAME``: turns the plugin on in this process and its children."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        if values != PLUGIN_NAME:
            _problem(parser, f"--plugin {values!r}: no such plugin; there is '{PLUGIN_NAME}'")
            return
        reason = off_reason()
        if reason is not None:  # off: do not enable it in any process
            _problem(parser, reason)
            return
        os.environ[ENABLE_ENV] = "1"
        _allow_endpoint_plugin()
        if isinstance(getattr(namespace, USAGE_OPTION, None), _NotGiven):
            setattr(namespace, USAGE_OPTION, True)
        _guarded(parser, activate)


class _SetOption(argparse.Action):
    """Checks one ``--stateful-*`` option, and writes it to the environment for all processes."""

    def __init__(self, *args: Any, option: Option, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.option = option

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            value = self.option.read(values, self.option.flag)
        except ConfigError as error:
            parser.error(str(error))
        # vLLM logs the namespace. The value itself is in the environment.
        setattr(namespace, self.dest, "..." if self.option.is_secret else value)
        if self.option.field != "strict" and off_reason() is not None:
            return
        write_option(self.option, values)
        if is_enabled() and not problems():  # the patches may depend on the option
            _guarded(parser, activate)


class _SetFlag(_SetOption):
    """An option without a value."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        super().__call__(parser, namespace, "1", option_string)
        if self.option.field == "strict" and problems():
            parser.error("--stateful-strict: " + problems()[0])


def _guarded(parser: argparse.ArgumentParser, install: Callable[[], None]) -> None:
    try:
        install()
    except StatefulError as error:
        parser.error(str(error))


def _problem(parser: argparse.ArgumentParser, text: str) -> None:
    """Log one clear line and serve as stock vLLM; in strict mode, end with an error."""
    _guarded(parser, lambda: report_problem(text))


def _allow_endpoint_plugin() -> None:
    """Name our routes in ``VLLM_PLUGINS`` without changing which other plugins load.

    vLLM loads endpoint plugins only if they are named there. For every other group, an unset
    variable means "all". So the names of all other plugins are written out, too. If that would
    switch on the routes of another plugin, ours stay off and the log says so.
    """
    named = os.environ.get("VLLM_PLUGINS")
    if named is not None:
        names = [name for name in named.split(",") if name]
    else:
        names = sorted(
            {found.name for group in GENERAL_GROUPS for found in entry_points(group=group)}
        )
        foreign = {found.name for found in entry_points(group=ENDPOINT_GROUP)} - {PLUGIN_NAME}
        if foreign & set(names):
            logger.warning(
                "stateful: session routes and metrics are off, since naming plugins would also "
                "load the routes of %s; set VLLM_PLUGINS yourself",
                ", ".join(sorted(foreign & set(names))),
            )
            return
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, PLUGIN_NAME]))
