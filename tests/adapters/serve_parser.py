# SPDX-License-Identifier: Apache-2.0
"""vLLM's own parser for ``vllm serve``, in a process that nothing has changed yet."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator

import pytest

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ModuleNotFoundError:  # from vllm 0.33 on
    from vllm.entrypoints.common.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_stateful.adapters import activation, fit
from vllm_stateful.compat.ledger import PATCHES

HOOKS = [hook for patch in PATCHES for hook in patch.calls]
Parse = Callable[..., argparse.Namespace]


def undo_all() -> None:
    for patch in PATCHES:
        patch.undo()
    for hook in HOOKS:
        hook.clear()


def make_parser() -> FlexibleArgumentParser:
    """vLLM's parser for ``vllm serve``, made as vLLM makes it."""
    activation.install_command_line()
    try:
        return make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    finally:
        undo_all()


@pytest.fixture
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process in which nobody has asked for the plugin, and its traces removed after."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("VLLM_STATEFUL") or name == "VLLM_PLUGINS":
            del os.environ[name]
    monkeypatch.setattr(fit, "_problems", [])
    undo_all()
    yield
    undo_all()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    kept = {key: os.environ.pop(key) for key in list(os.environ) if "STATEFUL" in key}
    try:
        return make_parser()
    finally:
        os.environ.update(kept)


@pytest.fixture
def parse(parser: FlexibleArgumentParser, monkeypatch: pytest.MonkeyPatch) -> Parse:
    def parse(*arguments: str, model: str = "some/model") -> argparse.Namespace:
        argv = ["serve", model, *arguments]
        monkeypatch.setattr(sys, "argv", ["vllm", *argv])
        return parser.parse_args(argv[1:])

    return parse
