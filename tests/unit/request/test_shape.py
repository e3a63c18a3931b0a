# SPDX-License-Identifier: Apache-2.0
"""What a request is made of, in the bodies of three APIs."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_stateful.request.shape import num_inline_system, shape_of
from vllm_stateful.types import Shape

SYSTEM = {"role": "system", "content": "You write titles."}
QUESTION = {"role": "user", "content": "Write a title."}
ANSWER = {"role": "assistant", "content": "A title."}
TOOL = {"type": "function", "function": {"name": "read"}}
CALL = {"type": "function_call", "name": "read", "arguments": "{}", "call_id": "1"}


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ({"messages": [SYSTEM, QUESTION]}, Shape.BARE),
        ({"messages": [QUESTION], "system": "You write titles.", "tools": []}, Shape.BARE),
        ({"input": "Write a title."}, Shape.BARE),
        ({"input": [{**QUESTION, "type": "message"}]}, Shape.BARE),
        ({"messages": [SYSTEM, QUESTION], "tools": [TOOL]}, Shape.TOOLS),
        ({"messages": [SYSTEM, QUESTION, ANSWER], "functions": [{"name": "read"}]}, Shape.TOOLS),
        ({"messages": [QUESTION, ANSWER, QUESTION]}, Shape.OTHER),
        ({"messages": [QUESTION, {"role": "tool", "content": "x"}]}, Shape.OTHER),
        ({"input": [QUESTION, CALL]}, Shape.OTHER),
        ({"input": "Go on.", "previous_response_id": "resp_1"}, Shape.OTHER),
        ({"input": "Go on.", "conversation": {"id": "conv_1"}}, Shape.OTHER),
        ({"prompt": "Once upon a time"}, Shape.OTHER),
        ({"messages": []}, Shape.OTHER),
        ({}, Shape.OTHER),
    ],
)
def test_the_shape_of_a_body(body: dict[str, Any], shape: Shape) -> None:
    assert shape_of(body) is shape


def test_system_messages_in_mid_conversation_are_counted() -> None:
    assert num_inline_system({"messages": [QUESTION, SYSTEM, ANSWER, SYSTEM]}) == 2
    assert num_inline_system({"system": "x", "messages": [QUESTION]}) == 0
    assert num_inline_system({"messages": [SYSTEM, SYSTEM, QUESTION, SYSTEM]}) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "type", "content"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["tools", "functions", "messages", "input"]), JSON, max_size=4)
)
def test_any_body_has_a_shape(body: dict[str, Any]) -> None:
    assert shape_of(body) in Shape
    assert num_inline_system(body) >= 0
