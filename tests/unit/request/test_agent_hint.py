# SPDX-License-Identifier: Apache-2.0
"""What is read of ``X-Agent-Hint``, and what is ignored."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_stateful.request.agent_hint import (
    DEFAULT_PIN_S,
    MAX_HINT_CHARS,
    MAX_SECONDS,
    MAX_TOOLS,
    NO_HINT,
    AgentHint,
    agent_hint,
)

HINTED = {
    "session_id": "0d3a9c52-6f1e-4b7a",
    "parent_session_id": "7be1c6f0-1a2b-4c3d",
    "lifecycle": "idle",
    "ttl": 600,
    "next_tools": [{"name": "run_tests", "expected_seconds": 90}, {"name": "read"}, "grep"],
}
HEARD = AgentHint(
    "0d3a9c52-6f1e-4b7a", "7be1c6f0-1a2b-4c3d", retain_s=600.0, tools=(("run_tests", 90.0),)
)


def read(said: Any) -> AgentHint:
    return agent_hint({"x-agent-hint": json.dumps(said)})


@pytest.mark.parametrize("padding", ["", "="])
def test_plain_json_and_base64url_say_the_same(padding: str) -> None:
    text = json.dumps(HINTED).encode()
    encoded = base64.urlsafe_b64encode(text).decode().rstrip("=") + padding * (-len(text) % 3)
    assert read(HINTED) == agent_hint({"x-agent-hint": encoded}) == HEARD
    assert agent_hint({}) is agent_hint({"x-agent-hint": ""}) is NO_HINT


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ({"session": "a-session"}, AgentHint("a-session")),
        ({"session": {"id": "s-1", "parent_id": "s-0"}}, AgentHint("s-1", "s-0")),
        ({"lifecycle": "final"}, AgentHint(is_final=True)),
        ({"lifecycle": "active"}, NO_HINT),
        ({"pin": True}, AgentHint(retain_s=DEFAULT_PIN_S)),
        ({"pin": True, "ttl": 60}, AgentHint(retain_s=60.0)),
        ({"pin": 120, "ttl": 60}, AgentHint(retain_s=120.0)),
        ({"pin": False, "ttl": 60}, NO_HINT),
        ({"ttl": 10**9}, AgentHint(retain_s=MAX_SECONDS)),
        ({"something": "new"}, NO_HINT),
        ({}, NO_HINT),
    ],
)
def test_what_is_heard(said: dict[str, Any], heard: AgentHint) -> None:
    assert read(said) == heard


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ({"lifecycle": "over"}, {}),
        ({"lifecycle": ["final"]}, {}),
        ({"ttl": "10m", "lifecycle": "final"}, {"is_final": True}),
        ({"ttl": -1}, {}),
        ({"pin": "yes", "ttl": 60}, {"retain_s": 60.0}),
        ({"next_tools": {"read": 1}}, {}),
        ({"next_tools": [7, {"name": "read", "expected_seconds": 2}]}, {"tools": (("read", 2.0),)}),
        ({"next_tools": [{"name": "read", "expected_seconds": "2"}]}, {}),
        ({"next_tools": [{"name": "x" * 200, "expected_seconds": 2}]}, {}),
        ({"next_tools": [{"name": "\ud800", "expected_seconds": 2}]}, {}),  # cannot be encoded
        ({"next_tools": [{"name": "a\nb", "expected_seconds": 2}]}, {}),
    ],
)
def test_the_rest_of_a_hint_is_heard_if_some_of_it_cannot_be_read(
    said: dict[str, Any], heard: dict[str, Any]
) -> None:
    assert read(said) == AgentHint(**heard, is_ignored=True)


@pytest.mark.parametrize(
    "sent",
    [
        "[]",
        "{",
        "7",
        "no base64!",
        "é",
        base64.urlsafe_b64encode(b"[]").decode(),
        base64.urlsafe_b64encode(b"\xff\xfe").decode(),
        json.dumps({"session_id": "x" * MAX_HINT_CHARS}),
        '{"a":' * 800 + "1" + "}" * 800,
        b"bytes",
    ],
)
def test_what_is_no_hint_is_ignored(sent: Any) -> None:
    assert agent_hint({"x-agent-hint": sent}).session is None
    assert agent_hint({"x-agent-hint": sent}).retain_s is None


def test_no_more_tools_are_heard_than_the_limit() -> None:
    tools = [{"name": f"tool-{number}", "expected_seconds": 1} for number in range(MAX_TOOLS + 1)]
    hint = read({"next_tools": tools})
    assert (len(hint.tools), hint.is_ignored) == (MAX_TOOLS, True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*HINTED, "session", "pin", "id", "name", "expected_seconds"]), inner
        )
    ),
    max_leaves=12,
)


@given(JSON, st.booleans())
def test_any_hint_is_heard_within_its_bounds(said: Any, is_encoded: bool) -> None:
    text = json.dumps(said)
    hint = agent_hint(
        {"x-agent-hint": base64.urlsafe_b64encode(text.encode()).decode() if is_encoded else text}
    )
    assert hint.retain_s is None or 0 < hint.retain_s <= MAX_SECONDS
    assert all(0 < expected_s <= MAX_SECONDS for _, expected_s in hint.tools)
