# SPDX-License-Identifier: Apache-2.0
"""What an agent hints in a header, on its way to the engine; and hints that cannot be read."""

import json
from typing import Any

import pytest
from test_identity import (
    DAY,
    SESSION,
    engine_request,
    hints,
    over_the_wire,
    sent,
    wished,
)
from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope

from vllm_stateful.adapters.engine.turn import expected_seconds, is_final, retention_wish
from vllm_stateful.adapters.frontend import identity, sent_body
from vllm_stateful.adapters.frontend.identity import stamp
from vllm_stateful.observe.hint_counts import HintCounts
from vllm_stateful.transport.wire import EXPECT_ACTION


def test_what_an_agent_hints_reaches_the_engine() -> None:
    hint = {"session_id": SESSION, "ttl": 600, "lifecycle": "final"}
    tools = [{"name": "run_tests", "expected_seconds": 90}]
    sent_hint = json.dumps({**hint, "next_tools": tools})
    request = over_the_wire(sent({"x-agent-hint": sent_hint}))
    assert request.session_id == f"agent-hint:{SESSION}"
    assert is_final(request)
    assert retention_wish(request) == 600
    assert expected_seconds(request, "run_tests") == 90
    assert expected_seconds(request, "read") is expected_seconds(request, None) is None


@pytest.mark.parametrize("payload", [{}, {"seconds": 7}, {"seconds": {"bash": "x"}}])
def test_times_that_cannot_be_read_say_nothing(payload: Any) -> None:
    request: Any = engine_request()
    request.kv_hints = KvHintsEnvelope("p", "m", [KvHintAction("a", EXPECT_ACTION, "1", payload)])
    assert expected_seconds(over_the_wire(request), "bash") is None


def test_the_longer_wish_of_header_and_body_counts() -> None:
    headers = {"x-agent-hint": json.dumps({"ttl": 600})}
    assert retention_wish(over_the_wire(wished(headers, DAY))) == 86_400
    retained = {"prompt_cache_retention": "in_memory"}
    headers = {"x-agent-hint": json.dumps({"pin": 900})}
    assert retention_wish(over_the_wire(wished(headers, retained))) == 900


def test_hints_that_cannot_be_read_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = HintCounts()
    monkeypatch.setattr(identity, "HINT_COUNTS", counts)
    monkeypatch.setattr(sent_body, "HINT_COUNTS", counts)
    wished({"x-agent-hint": "?", "x-session-id": "abc"}, {"prompt_cache_retention": "2h"})
    request = engine_request()
    request.kv_hints = hints({"seconds": "x"}, {})
    stamp(request)
    assert counts.snapshot() == {
        "hints_ignored": {
            "agent_hint": 1,
            "session_id": 1,
            "prompt_cache_retention": 1,
            "session_retain": 1,
        }
    }
