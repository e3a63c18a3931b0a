# SPDX-License-Identifier: Apache-2.0
"""Turns the plugin on in one process: checks vLLM's version, and applies the patches."""

from __future__ import annotations

import multiprocessing
import os
import sys

from vllm import envs
from vllm.logger import init_logger

from vllm_stateful.adapters.fit import (
    OFF_ENV,
    add_problem,
    check,
    is_fit,
    off_reason,
    report_problem,
)
from vllm_stateful.compat import uses
from vllm_stateful.compat.ledger import PATCHES, patch_of
from vllm_stateful.compat.patch import CompatError, Patch, Process, apply_all
from vllm_stateful.config import ENABLE_ENV, OPTIONS, StatefulConfig, process_config
from vllm_stateful.errors import UnsupportedError

logger = init_logger("vllm.stateful")

_RENDERER = ("vllm_stateful.adapters.frontend.renderer", "StatefulHfRenderer")

BEHIND_RUST = (
    "behind the Rust frontend sessions are told by session id, cache_salt and content. "
    "API keys do not separate tenants, prompts are sent whole, and there are no routes and no "
    "metrics of the plugin."
)

COMMAND_LINE = patch_of("cli-flags")

ELSEWHERE = (COMMAND_LINE, *map(patch_of, ("worker-logits", "worker-sampler")))
"""Patches that `activate` neither applies nor undoes: `install_command_line` applies the first, and
`SessionDrafter` the others, in the worker that has one."""


def install_command_line() -> None:
    """Add only ``--plugin`` and ``--stateful-*`` to vLLM's parser."""

    apply_all([COMMAND_LINE], strict=False, log=logger)


def activate() -> None:
    """Apply the patches that the options ask for, and no others; re-entrant.

    Raises:
        ConfigError: an option has a value that is not allowed.
        UnsupportedError: in strict mode, the vLLM version or a patched symbol is not supported.
    """
    config = process_config()
    _announce_variables()
    if OFF_ENV in os.environ:  # set by the process that started this one
        return
    processes = _processes(multiprocessing.current_process().name)
    reason = off_reason() or _drift_of_identity(processes)
    if reason is not None:
        report_problem(reason)
        return
    if envs.VLLM_USE_RUST_FRONTEND:
        if "api" in processes and _is_serving():
            processes = frozenset()  # it only starts an API server and an engine
        elif "engine" in processes and "api" not in processes:
            _say_what_rust_leaves(config)
    wanted = _patches_of(processes, config)
    try:
        for patch in reversed(PATCHES):
            if patch not in wanted and patch not in ELSEWHERE:
                patch.undo()
        applied = apply_all(
            wanted,
            strict=config.strict,
            log=logger,
            check=lambda feature: check(feature, processes),
        )
    except CompatError as error:
        add_problem(str(error))
        raise UnsupportedError(str(error)) from error
    for patch in wanted:
        if patch not in applied:
            add_problem(f"patch {patch.name!r} does not fit")
    if "api" in processes:
        _register_renderer()
    if processes:
        _choose_attention(processes, config.attention)


def _processes(name: str) -> frozenset[Process]:
    """What runs in a process, by the name that vLLM gives it.

    A worker, and the engine core, which may hold a worker, need only their own patches. The others
    would import vLLM's HTTP entry points there. Any other process may hold everything (``LLM``
    without multiprocessing).
    """
    if name.startswith("VllmWorker"):
        return frozenset({"worker"})
    if name.startswith("EngineCore"):
        return frozenset({"engine", "worker", "all"})
    return frozenset({"api", "engine", "worker", "all"})


def _is_serving() -> bool:
    """Whether this process starts vLLM's HTTP server and its engines."""
    is_server = sys.argv[1:2] == ["serve"] or sys.argv[0].endswith("api_server.py")
    return is_server and "--grpc" not in sys.argv


def _drift_of_identity(processes: frozenset[Process]) -> str | None:
    """What of vLLM has changed that tells a request's tenant to the engine, or that our routes use.

    If anything has, the whole plugin is off, in the engine as well.
    """
    if "api" not in processes:
        return None
    try:
        for feature in ("sessions", "endpoint") if _is_serving() else ("sessions",):
            uses.check(feature, frozenset({"api", "all"}))
        for patch in PATCHES:
            if patch.feature == "sessions" and patch.process == "api":
                patch.check()
    except CompatError as error:
        os.environ[OFF_ENV] = str(error)
        return str(error)
    return None


def _say_what_rust_leaves(config: StatefulConfig) -> None:
    """Log what does not work behind the Rust frontend; called once in each engine core.

    Raises:
        UnsupportedError: in strict mode, API keys were to separate tenants.
    """
    if config.strict and config.tenant == "api-key":
        raise UnsupportedError(f"{BEHIND_RUST} Strict, it needs --stateful-tenant cache-salt")
    logger.warning("stateful: %s", BEHIND_RUST)


def _patches_of(runs_here: frozenset[Process], config: StatefulConfig) -> list[Patch]:
    """The patches that a process needs."""
    off = set(config.disable)
    off |= set() if config.history == "generated" else {"history"}
    off |= set() if config.response_cache_bytes else {"responses"}
    off |= {"tool-call-check"} if config.tool_call_check == "off" else set()
    off |= {"shared-prefixes"} if config.attention == "off" else set()
    usable = [p for p in PATCHES if p not in ELSEWHERE and p.feature not in off]
    return [patch for patch in usable if patch.process in runs_here]


def _choose_attention(processes: frozenset[Process], choice: str) -> None:
    """Choose our attention where it is asked for; take it back where it was asked for before."""
    if choice == "off" and "vllm_stateful.adapters.attention_choice" not in sys.modules:
        return
    from vllm_stateful.adapters.attention_choice import choose_attention

    # An API server computes no attention. Importing vLLM's kernels to check them takes seconds.
    attends = "api" not in processes or not envs.VLLM_ENABLE_V1_MULTIPROCESSING
    fits = (lambda feature: is_fit(feature, "worker")) if attends else (lambda feature: True)
    choose_attention(choice, report_problem, fits=fits)


def _register_renderer() -> None:
    """Put our renderer in the place of vLLM's for Hugging Face tokenizers.

    This is done in the registry, and imports neither of them. Another plugin's renderer stays.
    """
    from vllm.renderers.registry import RENDERER_REGISTRY

    stock, ours = ("vllm.renderers.hf", "HfRenderer"), _RENDERER
    found = RENDERER_REGISTRY.renderers.get("hf")
    if found == ours:
        return
    if found != stock:
        report_problem(f"prompts are rendered by {found}")
        return
    if not is_fit("renderer", "api"):
        return
    del RENDERER_REGISTRY.renderers["hf"]  # else ``register`` warns of overwriting it
    RENDERER_REGISTRY.register("hf", *ours)


def _announce_variables() -> None:
    """Tell vLLM our environment variables, so that it does not warn of unknown ones.

    vLLM is not told their values. Values that vLLM can read are part of the key of its compile
    cache, and none of our options changes what is compiled.
    """
    for name in (ENABLE_ENV, *(option.env for option in OPTIONS)):
        envs.environment_variables.setdefault(name, lambda: None)
