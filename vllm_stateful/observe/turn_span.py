# SPDX-License-Identifier: Apache-2.0
"""The span of a turn for OpenTelemetry, made of the turn's record.

It has counts, durations and names from fixed sets. It has neither content, nor the tenant, nor the
session's id: the session is named by a hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

SPAN_NAME = "vllm_stateful.turn"

Attribute = str | int | float | bool

_OF_TURN = {
    "session": "gen_ai.conversation.id",
    "prompt_tokens": "gen_ai.usage.prompt_tokens",
    "output_tokens": "gen_ai.usage.completion_tokens",
    "queue_s": "gen_ai.latency.time_in_queue",
    "outcome": "vllm_stateful.outcome",
    "reused_tokens": "vllm_stateful.reused_tokens",
    "loaded_tokens": "vllm_stateful.loaded_tokens",
    "computed_tokens": "vllm_stateful.computed_tokens",
    "drafted_tokens": "vllm_stateful.drafted_tokens",
    "accepted_draft_tokens": "vllm_stateful.accepted_draft_tokens",
    "lookup_s": "vllm_stateful.lookup_seconds",
    "first_token_s": "vllm_stateful.first_token_seconds",
    "decode_s": "vllm_stateful.decode_seconds",
    "waited_s": "vllm_stateful.waited_seconds",
    "ended": "vllm_stateful.ended",
    "kept": "vllm_stateful.kept",
}
_OF_MISSED = {
    "cause": "vllm_stateful.missed.cause",
    "num_tokens": "vllm_stateful.missed.tokens",
    "token": "vllm_stateful.missed.token",
    "message": "vllm_stateful.missed.message",
    "kind": "vllm_stateful.missed.kind",
    "why_gone": "vllm_stateful.missed.why_gone",
}
_OF_SAID = {
    "source": "vllm_stateful.said.source",
    "compaction": "vllm_stateful.said.compaction",
    "retry": "vllm_stateful.said.retry",
}
_SOURCE = frozenset("abcdefghijklmnopqrstuvwxyz-")
_MAX_SOURCE_CHARS = 32


class TurnSpan(NamedTuple):
    """One span.

    Attributes:
        start_ns: when the request arrived, nanoseconds since 1970.
        end_ns: when the turn ended.
        attributes: by name; those that are not known are missing.
    """

    start_ns: int
    end_ns: int
    attributes: dict[str, Attribute]


def span_of(turn: Mapping[str, Any], ended_at: float) -> TurnSpan:
    """The span of a turn.

    Args:
        turn: its record, as ``TurnRecord.as_dict`` gives it.
        ended_at: when it ended, wall clock, seconds since 1970.
    """
    parts = ((turn, _OF_TURN), (turn["missed"], _OF_MISSED), (turn["said"], _OF_SAID))
    attributes: dict[str, Attribute] = {
        name: part[field]
        for part, names in parts
        for field, name in names.items()
        if part.get(field) is not None
    }
    source = turn["said"]["source"]
    if len(source) > _MAX_SOURCE_CHARS or not _SOURCE.issuperset(source):  # not of our API server
        del attributes[_OF_SAID["source"]]
    attributes["gen_ai.usage.cache_read.input_tokens"] = (
        turn["reused_tokens"] + turn["loaded_tokens"]
    )
    attributes["gen_ai.request.id"] = turn["client_id"]
    start_ns = int(turn["arrived_at"] * 1e9)
    return TurnSpan(start_ns, max(start_ns, int(ended_at * 1e9)), attributes)
