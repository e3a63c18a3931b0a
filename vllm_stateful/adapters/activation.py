# SPDX-License-Identifier: Apache-2.0
"""Turning the plugin on in one process: check the vLLM version, fill the hooks, patch."""

from __future__ import annotations

import multiprocessing
from typing import Any

from vllm import envs
from vllm.logger import init_logger

from vllm_stateful.compat import probe
from vllm_stateful.compat.ledger import PATCHES
from vllm_stateful.compat.patch import CompatError, Patch, apply_all
from vllm_stateful.compat.v0_32 import (
    anthropic_metadata,
    cli_flags,
    engine_utility,
    request_identity,
    scheduler_class,
    session_identity,
)
from vllm_stateful.config import ENABLE_ENV, OPTIONS, load_config
from vllm_stateful.errors import UnsupportedError

logger = init_logger("vllm.stateful")

_problems: list[str] = []


def problems() -> tuple[str, ...]:
    """Why the plugin, or a part of it, is off in this process."""
    return tuple(_problems)


def report_problem(text: str) -> None:
    """Log one line and go on as stock vLLM.

    Raises:
        UnsupportedError: the plugin is strict.
    """
    _problems.append(text)
    if load_config().strict:
        raise UnsupportedError(text)
    logger.warning("stateful: off, serving as stock vLLM: %s", text)


def install_command_line() -> None:
    """Make ``--plugin`` and ``--stateful-*`` known to vLLM's parser; nothing else."""

    def extend(parser: Any) -> None:
        from vllm_stateful.adapters.command_line import extend_parser

        extend_parser(parser)

    cli_flags.hook.set(extend)
    apply_all([cli_flags.PATCH], strict=False, log=logger)


def activate() -> None:
    """Apply all patches. Re-entrant.

    Raises:
        ConfigError: an option has a value that is not allowed.
        UnsupportedError: strict, and the vLLM version or a patched symbol is not supported.
    """
    strict = load_config().strict
    _announce_variables()
    reason = probe.unsupported_reason(probe.vllm_version())
    if reason is None and envs.VLLM_USE_RUST_FRONTEND:
        reason = "the Rust frontend would send requests without their tenant"
    if reason is not None:
        report_problem(reason)
        return
    _fill_hooks()
    wanted = _patches_of(multiprocessing.current_process().name)
    try:
        applied = apply_all(wanted, strict=strict, log=logger)
    except CompatError as error:
        _problems.append(str(error))
        raise UnsupportedError(str(error)) from error
    _problems.extend(_missing(wanted, applied))


def _patches_of(process_name: str) -> list[Patch]:
    """The patches that a process needs, by the name that vLLM gives it.

    A worker needs none and the engine core only its own: the others would import vLLM's HTTP
    entry points there. Any other process may hold everything (``LLM`` without multiprocessing).
    """
    if process_name.startswith("VllmWorker"):
        return []
    only_engine = process_name.startswith("EngineCore")
    runs_here = ("engine", "all") if only_engine else ("api", "engine", "all")
    usable = [patch for patch in PATCHES if patch is not cli_flags.PATCH]
    return [patch for patch in usable if patch.process in runs_here]


def _announce_variables() -> None:
    """Tell vLLM our environment variables, so that it does not warn of unknown ones.

    Their values are none of its business: what vLLM can read is part of the key of its compile
    cache, and no option of ours changes what is compiled.
    """
    for name in (ENABLE_ENV, *(option.env for option in OPTIONS)):
        envs.environment_variables.setdefault(name, lambda: None)


def _missing(wanted: list[Patch], applied: list[Patch]) -> list[str]:
    return [f"patch {patch.name!r} does not fit" for patch in wanted if patch not in applied]


def _fill_hooks() -> None:
    """Each hook imports its adapter when it is first called, in the process that needs it."""
    scheduler_class.hook.set(_choose_scheduler)
    session_identity.hook.set(_identify)
    request_identity.hook.set(_stamp)
    engine_utility.hook.set(_utility)
    anthropic_metadata.hook.set(_copy_metadata)


def _choose_scheduler(_: Any, stock: type) -> type:
    from vllm_stateful.adapters.scheduler import stateful_scheduler_class

    chosen = stateful_scheduler_class(stock)
    if chosen is None:
        report_problem(f"the scheduler is {stock.__module__}.{stock.__qualname__} (scheduler_cls)")
        return stock
    return chosen


def _identify(request: Any, raw_request: Any | None, stock: str | None) -> str | None:
    from vllm_stateful.adapters.identity import identify

    return identify(request, raw_request, stock)


def _stamp(request: Any) -> Any:
    from vllm_stateful.adapters.identity import stamp

    return stamp(request)


def _copy_metadata(anthropic_request: Any, chat_request: Any) -> None:
    from vllm_stateful.adapters.identity import copy_metadata

    copy_metadata(anthropic_request, chat_request)


def _utility(engine_core: Any, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
    from vllm_stateful.adapters.scheduler import answer_utility

    return answer_utility(engine_core.scheduler, operation, arguments)
