# SPDX-License-Identifier: Apache-2.0
"""The key of a request in the response cache: a digest of all that the engine is told of it."""

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
from vllm_stateful.transport.wire import (
    EXPECT_ACTION,
    RETAIN_ACTION,
    SHAPE_ACTION,
    TOOL_ACTION,
    TURN_ACTION,
)


class Uncached(StrEnum):
    """Why a request is neither answered from memory nor remembered.

    These are the labels of ``vllm_stateful_responses_uncached_total``.
    """

    SAMPLED = "sampled"
    """Its answer is sampled anew each time: it is not greedy and has no seed."""
    NO_STORE = "no_store"
    """It has the header ``Cache-Control: no-store``."""
    SOURCE = "source"
    """It did not come over HTTP, so its tenant is not known."""
    MULTIMODAL = "multimodal"
    """Its prompt is more than token ids."""
    STREAMED_INPUT = "streamed_input"
    PROMPT_LOGPROBS = "prompt_logprobs"
    HINTS = "hints"
    """It asks the engine for more than an answer: to end a session, or to move KV."""
    DATA_PARALLEL = "data_parallel"
    """It names its engine core. With several engine cores, no request is remembered or counted
    here."""
    PARAMETERS = "parameters"
    """One of its parameters cannot be compared."""


HANDED_OUT = frozenset({"output_kind", "stream_interval", "skip_clone"})
"""Fields of ``SamplingParams`` that say how an answer is delivered, not what it is."""

HARMLESS = frozenset({EXPECT_ACTION, RETAIN_ACTION, SHAPE_ACTION, TOOL_ACTION, TURN_ACTION})
"""KV hints that leave the answer and every session as they are."""

SESSION = "session_id"
"""The key in ``extra_args`` of the session id."""


def key_of(request: EngineCoreRequest, turn: TurnContext) -> bytes | Uncached:
    """A digest of 32 bytes that only equal requests share, or the reason why there is none.

    If a later vLLM adds a field to its sampling parameters, the digest includes it.

    Args:
        request: the request as it goes to the engine, with the tenant in its ``cache_salt``.
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
    """All fields and values, except those that only say how the answer is delivered.

    Dictionaries keep their order, because another order of a schema's properties makes another
    grammar.
    """
    said = []
    for name in params.__struct_fields__:
        value = getattr(params, name)
        if name in HANDED_OUT:
            continue
        if name == "extra_args" and value:
            value = {key: each for key, each in value.items() if key != SESSION}
        said.append((name, sorted(value) if isinstance(value, set) else value))
    return said
