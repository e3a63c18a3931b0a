# SPDX-License-Identifier: Apache-2.0
"""Which messages are plain, and that nothing is lost or moved when they are taken out."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_stateful.request.plain_messages import SplitMessages, plain_message

CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def answer(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", **fields}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "x"},
        {"content": "", "role": "system"},
        {"role": "developer", "content": "x"},
        {"role": "tool", "content": "x", "tool_call_id": "a"},
        answer(content="x"),
        answer(content=None),
        answer(content=None, tool_calls=[CALL, CALL]),
        answer(content="x", tool_calls=[CALL]),
        answer(tool_calls=[CALL]),
    ],
)
def test_plain_shapes(message: dict[str, Any]) -> None:
    before = copy.deepcopy(message)
    made = plain_message(message)
    assert made == before == message
    assert made is not message


@pytest.mark.parametrize(
    "message",
    [
        None,
        "user",
        {},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": ["x"]},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {"role": "user", "content": "x", "name": "n"},
        {"role": "user", "content": "x", "other": "n"},
        {"role": ["user"], "content": "x"},
        {"role": "function", "content": "x"},
        {"role": "tool", "content": "x"},
        {"role": "tool", "content": "x", "tool_call_id": 1},
        {"role": "tool", "content": "x", "tool_call_id": "a", "name": "f"},
        answer(content=["x"]),
        answer(content="x", reasoning="y"),
        answer(content="x", reasoning_content="y"),
        answer(content="x", refusal=None),
        answer(content="x", tool_calls=None),
        answer(content="x", tool_calls=[]),
        answer(tool_calls=[{**CALL, "index": 0}]),
        answer(tool_calls=[{**CALL, "type": "custom"}]),
        answer(tool_calls=[{**CALL, "id": None}]),
        answer(tool_calls=[{**CALL, "function": {"name": "f"}}]),
        answer(tool_calls=[{**CALL, "function": {"name": "f", "arguments": {}}}]),
        answer(tool_calls=[{**CALL, "function": "f"}]),
        answer(tool_calls=["x"]),
        answer(tool_calls="x"),
    ],
)
def test_every_other_shape_is_left_alone(message: Any) -> None:
    before = copy.deepcopy(message)
    assert plain_message(message) is None
    assert message == before


@given(st.lists(st.sampled_from([{"role": "user", "content": "x"}, {"role": "user"}, 7, None])))
def test_all_stay_in_their_places(messages: list[Any]) -> None:
    parts = SplitMessages(messages)
    assert parts.num_plain + len(parts.others) == len(messages)
    assert parts.joined(parts.others) == messages


def test_a_validation_that_drops_messages_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 messages validated, of 1"):
        SplitMessages([{"role": "user"}]).joined([])
