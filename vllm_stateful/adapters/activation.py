# SPDX-License-Identifier: Apache-2.0
"""Turning the plugin on in one process: check the vLLM version, fill the hooks, patch."""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import Any

from vllm import envs
from vllm.logger import init_logger

from vllm_stateful.compat import probe, uses
from vllm_stateful.compat.ledger import PATCHES
from vllm_stateful.compat.patch import CompatError, Patch, Process, apply_all, off_line
from vllm_stateful.compat.patches import (
    anthropic_usage,
    cli_flags,
    detokenizer_prompt,
    engine_utility,
    finished_answer,
    message_parsing,
    prompt_abort,
    prompt_answers,
    prompt_handover,
    prompt_miss,
    prompt_send,
    reasoning_end,
    request_identity,
    request_state,
    response_abort,
    response_forget,
    response_outputs,
    response_request,
    scheduler_class,
    session_identity,
    staged_ids,
    worker_batch,
    worker_ids,
    worker_requests,
    worker_speculator,
)
from vllm_stateful.config import ENABLE_ENV, OPTIONS, load_config
from vllm_stateful.errors import UnsupportedError

logger = init_logger("vllm.stateful")

_RENDERER = ("vllm_stateful.adapters.renderer", "StatefulHfRenderer")

_BEHIND_RUST = (
    "behind the Rust frontend sessions are told by session id, cache_salt and content. "
    "API keys do not separate tenants, prompts are sent whole, and there are no routes and no "
    "metrics of the plugin."
)

OFF_ENV = "STATEFUL_OFF_REASON"
"""Set by the process that starts the others where requests could not be told apart: sessions that
an engine kept all the same would be shared by all API keys."""

_problems: list[str] = []


def problems() -> tuple[str, ...]:
    """Why the plugin, or a part of it, is off in this process."""
    return tuple(_problems)


def off_reason() -> str | None:
    """Why all of the plugin is off, whatever is asked for: this vLLM is none that it knows."""
    return probe.unsupported_reason(probe.vllm_version()) or os.environ.get(OFF_ENV)


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
    """Apply the patches that the options ask for, and no others. Re-entrant.

    Raises:
        ConfigError: an option has a value that is not allowed.
        UnsupportedError: strict, and the vLLM version or a patched symbol is not supported.
    """
    strict = load_config().strict
    _announce_variables()
    if OFF_ENV in os.environ:  # said by the process that started this one
        return
    processes = _processes(multiprocessing.current_process().name)
    reason = off_reason() or _drift_of_identity(processes)
    if reason is not None:
        report_problem(reason)
        return
    _fill_hooks()
    if envs.VLLM_USE_RUST_FRONTEND:
        if "api" in processes and _is_serving():
            processes = frozenset()  # it holds neither an API server nor an engine: it starts both
        elif "engine" in processes and "api" not in processes:
            _say_what_rust_leaves()
    wanted = _patches_of(processes)
    try:
        for patch in reversed(PATCHES):
            if patch not in wanted and patch is not cli_flags.PATCH:
                patch.undo()
        applied = apply_all(
            wanted, strict=strict, log=logger, check=lambda feature: _check(feature, processes)
        )
    except CompatError as error:
        _problems.append(str(error))
        raise UnsupportedError(str(error)) from error
    _problems.extend(text for text in _missing(wanted, applied) if text not in _problems)
    if "api" in processes:
        _register_renderer()
    if processes:
        _choose_attention(processes)


def _processes(name: str) -> frozenset[Process]:
    """What runs in a process, by the name that vLLM gives it.

    A worker and the engine core, which may hold a worker, need only their own: the others would
    import vLLM's HTTP entry points there. Any other process may hold everything (``LLM`` without
    multiprocessing).
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
    """What has changed in the way of a request from its tenant to the engine, and of our routes.

    The whole plugin is off then, in the engine as well.
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


def _say_what_rust_leaves() -> None:
    """Once in each engine core.

    Raises:
        UnsupportedError: strict, and API keys were to separate tenants.
    """
    config = load_config()
    if config.strict and config.tenant == "api-key":
        raise UnsupportedError(f"{_BEHIND_RUST} Strict, it needs --stateful-tenant cache-salt")
    logger.warning("stateful: %s", _BEHIND_RUST)


def _check(feature: str, processes: frozenset[Process]) -> None:
    """Whether what a feature uses is there. What the engine and its workers use is looked at where
    they are: importing it takes seconds (`_choose_scheduler`).
    """
    try:
        uses.check(feature, frozenset({"api", "all"}) if "api" in processes else processes)
    except CompatError as error:
        _said.add(str(error))
        raise


_said: set[str] = set()
"""Drifts that the log has named: several features may use what has drifted."""


def drift_of(feature: str, process: Process) -> str | None:
    """What of vLLM a feature does not fit; None when it fits all."""
    try:
        uses.check(feature, frozenset({process, "all"}))
    except CompatError as error:
        return str(error)
    return None


def is_fit(feature: str, process: Process) -> bool:
    """Whether a feature fits this vLLM. Where it does not, the log says so, once in a process.

    Raises:
        UnsupportedError: it does not, and the plugin is strict.
    """
    drift = drift_of(feature, process)
    if drift is None:
        return True
    line = off_line([feature], drift)
    _problems.append(line)
    if load_config().strict:
        raise UnsupportedError(line)
    if drift not in _said:
        _said.add(drift)
        logger.warning("stateful: %s", line)
    return False


def _patches_of(runs_here: frozenset[Process]) -> list[Patch]:
    """The patches that a process needs."""
    config = load_config()
    off = set(config.disable)
    off |= set() if config.history == "generated" else {"history"}
    off |= set() if config.response_cache_bytes else {"responses"}
    off |= {"tool-call-check"} if config.tool_call_check == "off" else set()
    off |= {"shared-prefixes"} if config.attention == "off" else set()
    usable = [p for p in PATCHES if p is not cli_flags.PATCH and p.feature not in off]
    return [patch for patch in usable if patch.process in runs_here]


def _choose_attention(processes: frozenset[Process]) -> None:
    """Where it is asked for, or was before."""
    choice = load_config().attention
    if choice == "off" and "vllm_stateful.adapters.attention_choice" not in sys.modules:
        return
    from vllm_stateful.adapters.attention_choice import choose_attention

    # An API server attends to nothing. Importing vLLM's kernels to look at them takes seconds.
    attends = "api" not in processes or not envs.VLLM_ENABLE_V1_MULTIPROCESSING
    fits = (lambda feature: is_fit(feature, "worker")) if attends else (lambda feature: True)
    choose_attention(choice, report_problem, fits=fits)


def _register_renderer() -> None:
    """Put our renderer in the place of vLLM's for Hugging Face tokenizers.

    Through the registry, without importing either; another plugin's renderer stays.
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
    anthropic_usage.hook.set(_with_cache_creation)
    detokenizer_prompt.hook.set(_with_prompt_tail)
    prompt_send.hook.set(_pack)
    prompt_answers.hook.set(_take_misses)
    prompt_abort.hook.set(_aborted)
    prompt_handover.hook.set(_receive)
    prompt_miss.hook.set(_answer_miss)
    worker_ids.hook.set(_worker_ids)
    staged_ids.hook.set(_write_ids)
    worker_speculator.hook.set(_make_speculator)
    worker_requests.hook.set(_note_requests)
    worker_batch.hook.set(_note_batch)
    reasoning_end.hook.set(_is_reasoning_end)
    finished_answer.hook.set(_note_answer)
    message_parsing.hook.set(_parse_new_messages)
    response_request.hook.set(_is_answered)
    response_abort.hook.set(_left_to_abort)
    response_outputs.hook.set(_with_followers)
    response_outputs.stopped.set(_note_stopped)
    response_forget.hook.set(_note_call)
    response_forget.done.set(_note_done)
    request_state.hook.set(_state_maker)


def _choose_scheduler(_: Any, stock: type) -> type:
    if not is_fit("sessions", "engine"):
        return stock
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


def _with_cache_creation(raw_request: Any, answer: Any) -> Any:
    from vllm_stateful.adapters.anthropic_usage import with_cache_creation

    return with_cache_creation(raw_request, answer)


def _with_prompt_tail(tokenizer: Any, request: Any) -> Any:
    from vllm_stateful.adapters.detokenizer import with_prompt_tail

    return with_prompt_tail(tokenizer, request)


def _is_reasoning_end(parser: Any, token_ids: Any) -> bool | None:
    """The last thinking token decides, and the prompt may know where it is."""
    from vllm_stateful.transport.prompt_ids import PromptTokenIds

    if not isinstance(token_ids, PromptTokenIds):
        return None
    end, start = parser.end_token_id, parser.start_token_id
    return token_ids.last_place(end) > token_ids.last_place(start)


def _note_answer(state: Any) -> None:
    from vllm_stateful.adapters.renderer import note_answer

    note_answer(state)


async def _parse_new_messages(parse: Any, messages: Any, *arguments: Any) -> Any:
    from vllm_stateful.adapters.messages import parse_new_messages

    return await parse_new_messages(parse, messages, *arguments)


def _state_maker(stock: Any, request: Any) -> Any:
    from vllm_stateful.adapters.tool_call_check import state_maker

    return state_maker(stock, request)


def _pack(client: Any, request_type: Any, message: Any, engine: Any) -> Any:
    from vllm_stateful.adapters.prompt_sender import pack

    return pack(client, request_type, message, engine)


def _take_misses(client: Any, outputs: Any) -> list[Any]:
    from vllm_stateful.adapters.prompt_sender import sender_of

    return sender_of(client).take_misses(outputs)


def _aborted(client: Any, request_ids: list[str]) -> None:
    from vllm_stateful.adapters.prompt_sender import sender_of

    sender_of(client).aborted(request_ids)


def _receive(core: Any, request: Any, proceed: Any) -> Any:
    from vllm_stateful.adapters.prompt_receiver import receive

    return receive(core, request, proceed)


def _answer_miss(core: Any, request: Any) -> bool:
    from vllm_stateful.adapters.prompt_receiver import answer_miss

    return answer_miss(core, request)


def _worker_ids(request: Any, all_ids: Any, uses_mrope: bool) -> tuple[Any, Any]:
    from vllm_stateful.adapters.worker_ids import worker_ids

    return worker_ids(request, all_ids, uses_mrope)


def _write_ids(table: Any, index: int, start: int, ids: Any) -> None:
    from vllm_stateful.adapters.worker_ids import write_ids

    write_ids(table, index, start, ids)


def _make_speculator(stock: Any, vllm_config: Any, device: Any, req_states: Any) -> Any:
    from vllm_stateful.adapters.lookup_speculator import make_speculator

    return make_speculator(stock, vllm_config, device, req_states)


def _note_requests(runner: Any, scheduler_output: Any) -> None:
    from vllm_stateful.adapters.lookup_speculator import note_requests

    note_requests(runner, scheduler_output)


def _note_batch(batch: Any, scheduler_output: Any) -> None:
    from vllm_stateful.adapters.batch_prefixes import note_batch

    note_batch(batch, scheduler_output)


def _is_answered(client: Any, request: Any) -> bool:
    from vllm_stateful.adapters.response_cache import responses_of

    return responses_of(client).is_answered(request)


def _left_to_abort(client: Any, request_ids: list[str]) -> list[str]:
    from vllm_stateful.adapters.response_cache import responses_of

    return responses_of(client).aborted(request_ids)


def _with_followers(outputs: list[Any]) -> list[Any]:
    from vllm_stateful.adapters.response_cache import with_followers

    return with_followers(outputs)


def _note_stopped(request_ids: list[str]) -> None:
    from vllm_stateful.adapters.response_cache import stopped

    stopped(request_ids)


def _note_call(client: Any, method: str) -> None:
    from vllm_stateful.adapters.response_cache import called

    called(client, method)


async def _note_done(client: Any, method: str, engine: Any) -> None:
    from vllm_stateful.adapters.response_cache import done

    await done(client, method, engine)


def _utility(engine_core: Any, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
    from vllm_stateful.adapters.response_epoch import EPOCH, answer_epoch

    if operation == "transport":
        return {"ready": prompt_handover.PATCH.is_applied and prompt_miss.PATCH.is_applied}
    if operation == EPOCH:
        return answer_epoch(engine_core, **arguments)
    drift = drift_of("sessions", "engine")
    if drift is not None:
        return {"off": drift}
    from vllm_stateful.adapters.scheduler import answer_utility

    return answer_utility(engine_core.scheduler, operation, arguments)
