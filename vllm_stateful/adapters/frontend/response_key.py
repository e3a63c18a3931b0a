# SPDX-License-Identifier: Apache-2.0
"""What makes two requests the same: everything that the engine is told of them."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Any

import msgspec
from vllm.sampling_params import SamplingParams, SamplingType
from vllm.v1.engine import EngineCoreRequest

from vllm_stateful.adapters.frontend.turn_context import TurnContext
from vllm_stateful.adapters.model_input import identity_of
from vllm_stateful.transport.prompt_ids import digest_of
from vllm_stateful.transport.wire import RETAIN_ACTION, TOOL_ACTION


class Uncached(StrEnum):
    """Why a request is neither answered from memory nor remembered; label of
    ``vllm_stateful_responses_uncached_total``."""

    SAMPLED = "sampled"
    """Its answer is drawn anew each time: neither greedy nor with a seed."""
    NO_STORE = "no_store"
    """``Cache-Control: no-store``."""
    SOURCE = "source"
    """It did not come over HTTP, so nobody knows whose it is."""
    MULTIMODAL = "multimodal"
    """More than token ids."""
    STREAMED_INPUT = "streamed_input"
    PROMPT_LOGPROBS = "prompt_logprobs"
    HINTS = "hints"
    """It tells the engine more than to answer: to end a session, or to move KV."""
    DATA_PARALLEL = "data_parallel"
    """It names its engine core. With several, none is remembered, nor counted here."""
    PARAMETERS = "parameters"
    """A parameter cannot be compared."""


HANDED_OUT = frozenset({"output_kind", "stream_interval", "skip_clone"})
"""Fields of SamplingParams that say how an answer is handed out, not what it is."""

HARMLESS = frozenset({RETAIN_ACTION, TOOL_ACTION})
"""KV hints that leave the answer and every session as they are."""

SESSION = "session_id"
"""Key of ``extra_args``: whose turn it is."""


def key_of(request: EngineCoreRequest, turn: TurnContext) -> bytes | Uncached:
    """A digest of 32 bytes that only equal requests share, or why there is none.

    A field that a later vLLM adds to its sampling parameters is part of it without further ado.

    Args:
        request: as it goes to the engine, with the tenant in its ``cache_salt``.
        turn: the turn that it belongs to.
    """
    if turn.cache_control is None:
        return Uncached.SOURCE
    reason = _refused(request)
    if reason is not None:
        return reason
    if not turn.cache_control.is_stored:
        return Uncached.NO_STORE
    others = (
        turn.tools,
        identity_of(request),
        request.reasoning_ended,
        request.reasoning_parser_kwargs,
    )
    assert request.sampling_params is not None
    assert request.prompt_token_ids is not None
    try:
        said = msgspec.msgpack.encode((others, _parameters(request.sampling_params)))
    except (TypeError, ValueError, OverflowError):
        return Uncached.PARAMETERS
    digest = hashlib.blake2b(len(said).to_bytes(8, "little"), digest_size=32)
    digest.update(said)
    digest.update(digest_of(request.prompt_token_ids))
    return digest.digest()


def _refused(request: EngineCoreRequest) -> Uncached | None:
    params = request.sampling_params
    if params is None or params.sampling_type == SamplingType.RANDOM:
        return Uncached.SAMPLED
    if request.prompt_token_ids is None or request.prompt_is_token_ids is not None:
        return Uncached.MULTIMODAL
    if request.mm_features or request.prompt_embeds is not None:
        return Uncached.MULTIMODAL
    if request.resumable or request.abort_immediately:
        return Uncached.STREAMED_INPUT
    if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
        return Uncached.PROMPT_LOGPROBS
    if (params.extra_args or {}).get("kv_transfer_params"):
        return Uncached.HINTS
    hints = request.kv_hints
    if hints is not None and any(each.action_type not in HARMLESS for each in hints.actions):
        return Uncached.HINTS
    if request.data_parallel_rank is not None:
        return Uncached.DATA_PARALLEL
    return None


def _parameters(params: SamplingParams) -> list[tuple[str, Any]]:
    """Every field but those that only hand the answer out; dictionaries keep their order, as the
    order of a schema's properties makes another grammar."""
    said = []
    for name in params.__struct_fields__:
        value = getattr(params, name)
        if name in HANDED_OUT:
            continue
        if name == "extra_args" and value:
            value = {key: each for key, each in value.items() if key != SESSION}
        said.append((name, sorted(value) if isinstance(value, set) else value))
    return said
