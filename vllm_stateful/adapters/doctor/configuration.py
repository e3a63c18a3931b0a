# SPDX-License-Identifier: Apache-2.0
"""Reads the command line as ``vllm serve`` does, with the plugin on."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_stateful.adapters import activation
from vllm_stateful.config import ENABLE_ENV, OPTIONS
from vllm_stateful.errors import StatefulError

_STRICT = "--stateful-strict"
_STRICT_ENV = f"{ENABLE_ENV}_STRICT"

MOST_SAID = 400
"""The most characters of vLLM's error that are shown."""


class RefusedError(StatefulError):
    """vLLM would not start with these arguments. The text says why, in one line."""


class Asked(NamedTuple):
    """What was asked for.

    Attributes:
        arguments: the arguments of the command line, as vLLM's parser reads them.
        options: our options that were given, by field: their text, and where it came from.
    """

    arguments: argparse.Namespace
    options: dict[str, tuple[str, str]]

    @property
    def model(self) -> str | None:
        """The model; None if none was named."""
        found: str | None = getattr(self.arguments, "model_tag", None)
        return found

    @property
    def is_caching_left_to_vllm(self) -> bool:
        """Whether no argument says if prefixes are cached."""
        return getattr(self.arguments, "enable_prefix_caching", None) is None


def parse(words: Sequence[str]) -> Asked:
    """Read the command line, and activate the plugin as it says.

    ``--stateful-strict`` is left out, because the question here is why something is off.

    Raises:
        RefusedError: vLLM, or one of our options, refuses the command line.
    """
    before = dict(os.environ)
    is_strict = any(word.replace("_", "-") == _STRICT for word in words)
    os.environ.pop(_STRICT_ENV, None)
    activation.install_command_line()
    subcommand = ServeSubcommand()
    parser = subcommand.subparser_init(FlexibleArgumentParser().add_subparsers())
    parser.error = _refuse
    named = [] if _names_a_plugin(words) else ["--plugin", "stateful"]
    wanted = [word for word in words if word.replace("_", "-") != _STRICT]
    try:
        arguments = parser.parse_args([*wanted, *named])
        os.environ.pop(_STRICT_ENV, None)  # it may come from a file of options
        if arguments.model_tag is not None:
            arguments.model = arguments.model_tag
        subcommand.validate(arguments)
    except RefusedError:
        raise
    except Exception as error:
        raise RefusedError(one_line(error)) from error
    return Asked(arguments, _given(before, is_strict))


def _names_a_plugin(words: Sequence[str]) -> bool:
    return any(word == "--plugin" or word.startswith("--plugin=") for word in words)


def _refuse(message: str) -> NoReturn:
    raise RefusedError(message)


def _given(before: dict[str, str], is_strict: bool) -> dict[str, tuple[str, str]]:
    """Our options by field: their text, and where it came from."""
    now = {**os.environ, **({_STRICT_ENV: "1"} if is_strict else {})}
    made = {}
    for option in OPTIONS:
        text = now.get(option.env, before.get(option.env))
        if text is not None:
            is_same = before.get(option.env) == text
            made[option.field] = (text, option.env if is_same else option.flag)
    return made


def configured(asked: Asked) -> tuple[Any, Any]:
    """vLLM's configuration, and the same configuration for one device.

    The groups of the KV cache are the same on one device, which waits for no other device.

    Raises:
        RefusedError: vLLM refuses the configuration.
    """
    model = str(asked.model)
    if model.startswith(("/", "./", "../", "~")) and not Path(model).exists():
        raise RefusedError(f"{model}: there is no such folder or file")
    try:
        engine = AsyncEngineArgs.from_cli_args(asked.arguments)
        config = engine.create_engine_config()
        parallel = config.parallel_config
        if parallel.world_size == 1 and parallel.data_parallel_size == 1:
            return config, config
        alone = replace(
            engine,
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            data_parallel_size=1,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            enable_expert_parallel=False,
            distributed_executor_backend=None,
        )
        return config, alone.create_engine_config()
    except Exception as error:
        raise RefusedError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """The text of vLLM's error, in one line."""
    listed = getattr(error, "errors", None)  # pydantic's: each has a message
    text = "; ".join(str(each["msg"]) for each in listed()) if callable(listed) else str(error)
    text = textwrap.shorten(text.removeprefix("Value error, "), MOST_SAID, placeholder=" ...")
    return text or type(error).__name__
