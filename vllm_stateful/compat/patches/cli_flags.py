# SPDX-License-Identifier: Apache-2.0
"""``vllm serve --plugin stateful``: flags of a general plugin on vLLM's command line."""

from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[ArgumentParser], None]] = Hook("cli-flags")
"""Gets each parser that vLLM has put its engine arguments on, to add more."""


def _wrap(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        if (fn := hook.fn) is not None:
            fn(parser)
        return parser

    return add_cli_args


PATCH = Patch(
    name="cli-flags",
    target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
    wrap=_wrap,
    symptom="A general plugin cannot add flags to `vllm serve`.",
    reason="vLLM loads general plugins just before it builds this parser, but then offers the "
    "parser to platform plugins only (current_platform.pre_register_and_update).",
    feature="cli",
    process="api",
    signature="(parser)",
    upstream="vllm-0.32/0001-cli-flags.patch",
    remove_when="vLLM has an entry point group for functions that add command line arguments.",
)
