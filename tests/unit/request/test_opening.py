# SPDX-License-Identifier: Apache-2.0
"""How a conversation begins, as a name for it."""

import pytest

from vllm_stateful.request import opening_of

SYSTEM = {"role": "system", "content": "You are an agent."}
QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}


def test_all_turns_of_a_conversation_begin_alike() -> None:
    first = opening_of([SYSTEM, QUESTION])
    assert first is not None
    assert opening_of([SYSTEM, QUESTION, ANSWER, {"role": "user", "content": "And?"}]) == first


@pytest.mark.parametrize(
    "other",
    [
        [QUESTION],
        [{**SYSTEM, "role": "developer"}, QUESTION],
        [SYSTEM, {"role": "user", "content": "Why not?"}],
        [{"role": "system", "content": "You are an agent.Why"}, {"role": "user", "content": "?"}],
    ],
)
def test_another_beginning_is_another_conversation(other: list[dict[str, str]]) -> None:
    assert opening_of(other) not in {None, opening_of([SYSTEM, QUESTION])}


def test_parts_of_text_count() -> None:
    parts = [{"type": "text", "text": "Why?"}, {"type": "input_text", "text": "Now."}]
    assert opening_of([{"role": "user", "content": parts}]) is not None
    assert opening_of([{"role": "user", "content": parts[:1]}]) != opening_of(
        [{"role": "user", "content": parts}]
    )


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "a prompt",
        [],
        [SYSTEM],
        [SYSTEM, ANSWER],
        ["no message"],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": ["no part"]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
        [{"type": "function_call", "name": "f"}] * 20 + [QUESTION],
    ],
)
def test_what_is_not_a_conversation_of_text_has_none(messages: object) -> None:
    assert opening_of(messages) is None


def test_half_a_surrogate_is_text() -> None:
    assert opening_of([{"role": "user", "content": "\ud83d"}]) is not None
