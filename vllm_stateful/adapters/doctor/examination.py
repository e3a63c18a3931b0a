# SPDX-License-Identifier: Apache-2.0
"""Finds out what the plugin will do with one command line, finding by finding."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from vllm import envs
from vllm.platforms import current_platform

from vllm_stateful.adapters.activation import BEHIND_RUST
from vllm_stateful.adapters.doctor.configuration import Asked, configured, one_line, parse
from vllm_stateful.adapters.fit import OFF_ENV, drift_of, off_reason, problems
from vllm_stateful.adapters.speculation import (
    CUSTOM_PROCESSORS,
    has_custom_processors,
    has_head,
    is_asked_for,
    is_looked_up,
    why_no_drafts,
    why_not_beside_head,
)
from vllm_stateful.cli.findings import Finding
from vllm_stateful.config import OPTIONS, StatefulConfig, process_config

_UNKNOWN = {"is_known": False}

SECRETS = tuple(option.field for option in OPTIONS if option.is_secret)


def examine(words: Sequence[str]) -> Iterator[Finding]:
    """All findings for which vLLM has to be asked.

    Raises:
        RefusedError: vLLM refuses the arguments.
    """
    asked = parse(words)
    yield _platform()
    yield _options(asked)
    if OFF_ENV in os.environ:
        yield Finding("sessions", "off", f"not kept: {off_reason()}")
        return
    yield from (Finding("plugin", "off", problem) for problem in problems())
    yield _kernels(process_config().attention)
    if envs.VLLM_USE_RUST_FRONTEND:
        yield Finding("frontend", "warn", BEHIND_RUST)
    if asked.model is None:
        return
    if (drift := drift_of("doctor", "api")) is not None:
        yield _unknown("sessions", drift)
    elif current_platform.is_unspecified():
        yield _unknown("sessions", "vLLM finds no device here that it knows")
    else:
        yield from _model(asked)


def _platform() -> Finding:
    name = current_platform.device_name or "none that vLLM knows"
    return Finding("platform", "ok", name, {"device_type": current_platform.device_type})


def _options(asked: Asked) -> Finding:
    given = [
        f"{field} {'...' if field in SECRETS else text} ({source})"
        for field, (text, source) in asked.options.items()
    ]
    config = process_config()
    facts = {**vars(config), "disable": sorted(config.disable), "strict": "strict" in asked.options}
    facts |= {name: bool(facts[name]) for name in SECRETS}
    return Finding("options", "ok", ", ".join(given) or "all are at their defaults", facts)


# ---- kernels -------------------------------------------------------------------------------------


def _kernels(choice: str) -> Finding:
    if choice == "off":
        return Finding("kernels", "ok", "attention is left to vLLM (--stateful-attention off)")
    if current_platform.is_cpu():
        from vllm_stateful.attention import cpu_ops

        reason = cpu_ops.why_unavailable()
        if reason:
            return Finding("kernels", "warn", f"attention is left to vLLM: {reason}")
        return Finding("kernels", "ok", "those for CPUs load; those for CUDA do not matter here")
    if not current_platform.is_cuda():
        return Finding("kernels", "ok", "there are none for this platform, and none are needed")
    from vllm_stateful.attention import ops

    reason = ops.why_unavailable()
    if choice == "on":
        text = f"attention is left to vLLM: {reason}" if reason else "those for CUDA load"
        return Finding("kernels", "off" if reason else "ok", text)
    said = reason or "those for CUDA load"
    return Finding("kernels", "ok", f"{said}; --stateful-attention on would take them")


# ---- a model -------------------------------------------------------------------------------------


def _model(asked: Asked) -> Iterator[Finding]:
    config, alone = configured(asked)
    connector, why_no_connector = _connector_of(config)
    if why_no_connector is not None:
        yield Finding("sessions", "off", f"vLLM does not start: {why_no_connector}")
    else:
        yield from _sessions(asked, config, alone, connector)
    options = process_config()
    yield _drafts(config, options)
    yield from _text(asked, alone)


def _connector_of(config: Any) -> tuple[Any, str | None]:
    """The connector that was asked for, and the reason if vLLM cannot make it."""
    from vllm_stateful.adapters.doctor.connectors import stand_in

    if config.kv_transfer_config is None:
        return None, None
    try:
        return stand_in(config), None
    except Exception as error:
        return None, one_line(error)


def _sessions(asked: Asked, config: Any, alone: Any, connector: Any) -> Iterator[Finding]:
    from vllm_stateful.adapters.doctor.files import file_findings
    from vllm_stateful.adapters.doctor.no_weights import engine_core
    from vllm_stateful.adapters.doctor.verdict import groups_of, off_reason_of

    parallel = config.parallel_config
    try:
        core = engine_core(alone)
    except Exception as error:
        yield _unknown("sessions", f"{type(error).__name__}: {one_line(error)}")
        return
    scheduler = core.scheduler
    scheduler.dcp_world_size = parallel.decode_context_parallel_size
    scheduler.pcp_world_size = parallel.prefill_context_parallel_size
    groups = groups_of(scheduler)
    reason = off_reason_of(scheduler, connector)
    kept = "kept" if reason is None else f"not kept: {reason}"
    if not config.cache_config.enable_prefix_caching and asked.is_caching_left_to_vllm:
        kept += ", which is vLLM's default for this model: --enable-prefix-caching turns it on"
    text = f"{kept}; KV cache groups: {groups}"
    facts = {"groups": groups, "reason": reason}
    yield Finding("sessions", "ok" if reason is None else "off", text, facts)
    if connector is not None and reason is None:
        name = type(connector).__name__
        yield Finding("connector", "ok", f"sessions are kept beside {name}")
        yield from file_findings(connector, config.cache_config.prefix_caching_hash_algo)


def _drafts(config: Any, options: StatefulConfig) -> Finding:
    if config.speculative_config is None:
        return Finding("drafts", "ok", f"none: {why_no_drafts(options)}")
    method = config.speculative_config.method
    if is_asked_for(config):
        if has_custom_processors(config.model_config):
            return Finding("drafts", "off", f"off: {CUSTOM_PROCESSORS}")
        return Finding("drafts", "ok", "from sessions, by the engine core")
    if is_looked_up(config):
        return Finding("drafts", "ok", "from sessions, looked up on the device")
    if not has_head(config):
        return Finding("drafts", "ok", f"from vLLM's {method}; sessions draft nothing beside it")
    reason = why_not_beside_head(config, options)
    said = "on" if reason is None else f"off: {reason}"
    text = f"from the head ({method}); drafts from sessions beside it: {said}"
    return Finding("drafts", "ok" if reason is None else "warn", text)


def _text(asked: Asked, config: Any) -> Iterator[Finding]:
    from vllm_stateful.adapters.doctor.text import stages

    if config.model_config.skip_tokenizer_init:
        yield Finding("tokenizer", "ok", "none (--skip-tokenizer-init): prompts come as token ids")
        return
    try:
        yield from stages(asked, config)
    except Exception as error:
        yield _unknown("tokenizer", f"{type(error).__name__}: {one_line(error)}")


def _unknown(section: str, why: str) -> Finding:
    return Finding(section, "warn", f"not known before the start: {why}", _UNKNOWN)
