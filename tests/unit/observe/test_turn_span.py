# SPDX-License-Identifier: Apache-2.0
"""What is in the span of a turn, and what never is."""

from typing import Any

import pytest

from vllm_stateful.observe.turn_span import span_of
from vllm_stateful.session import Cause, Missed, Said, TurnRecord, client_id, name_of
from vllm_stateful.types import Identity, SessionKey

SESSION = SessionKey(Identity("vllm-stateful.secret-tenant"), "secret-session")


def turn(**changes: Any) -> dict[str, Any]:
    made = TurnRecord("chatcmpl-1-0a1b2c3d", SESSION, 100.0, "diverged", 1500, 900, 100, 7)
    missed = Missed(Cause.CHANGED, 400, token=1000, message=3, kind="user")
    missed.before, missed.now = "secret words", "other secret words"
    made.missed, made.waited_for = missed, "secret_tool"
    made.said = Said("codex", "secret-parent", retry=1)
    for name, value in changes.items():
        setattr(made, name, value)
    return {**made.as_dict(), "client_id": client_id(made)}


def test_a_span_has_the_counts_of_its_turn() -> None:
    span = span_of(turn(queue_s=0.5), 102.5)
    assert (span.start_ns, span.end_ns) == (100_000_000_000, 102_500_000_000)
    expected = {
        "gen_ai.request.id": "chatcmpl-1",
        "gen_ai.conversation.id": name_of(SESSION),
        "gen_ai.usage.prompt_tokens": 1500,
        "gen_ai.usage.completion_tokens": 7,
        "gen_ai.usage.cache_read.input_tokens": 1000,
        "gen_ai.latency.time_in_queue": 0.5,
        "vllm_stateful.outcome": "diverged",
        "vllm_stateful.computed_tokens": 500,
        "vllm_stateful.missed.cause": "changed",
        "vllm_stateful.missed.token": 1000,
        "vllm_stateful.said.source": "codex",
        "vllm_stateful.said.retry": 1,
    }
    assert expected.items() <= span.attributes.items()


def test_nothing_secret_is_in_a_span() -> None:
    assert "secret" not in str(span_of(turn(), 102.0))


@pytest.mark.parametrize("source", ["secret words", "x" * 33])
def test_a_source_that_is_none_of_ours_is_left_out(source: str) -> None:
    attributes = span_of(turn(said=Said(source)), 102.0).attributes
    assert "vllm_stateful.said.source" not in attributes


def test_what_is_not_known_is_missing_and_no_span_ends_before_it_begins() -> None:
    span = span_of(turn(), 99.0)
    assert span.end_ns == span.start_ns
    assert None not in span.attributes.values()
    assert "vllm_stateful.decode_seconds" not in span.attributes
