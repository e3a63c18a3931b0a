# SPDX-License-Identifier: Apache-2.0
"""What is remembered of parsed messages: exactly what was parsed, and within bounds."""

import copy
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_stateful.render.message_memory import (
    MAX_NEW_MESSAGES,
    MIN_MESSAGES,
    NOTHING,
    MessageMemory,
    exact_image,
    images_of,
)


def message(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def parse(messages: list[dict[str, Any]]) -> list[str]:
    return [repr(m) for m in messages]


def turn(memory: MessageMemory, messages: list[dict[str, Any]], scope: str = "") -> int:
    """What an adapter does; returns how many messages were known."""
    images = images_of(messages)
    if images is None:
        return 0
    known = memory.find(scope, images)
    parsed = known.parsed + parse(messages[known.num_messages :])
    assert parsed == parse(messages)
    memory.keep(scope, images, parsed, known)
    return known.num_messages


def conversation(length: int) -> list[dict[str, Any]]:
    return [message(f"m{i}") for i in range(length)]


def test_a_turn_that_adds_messages_finds_the_others() -> None:
    memory = MessageMemory()
    assert turn(memory, conversation(20)) == 0
    assert turn(memory, conversation(23)) == 20
    assert turn(memory, conversation(23)) == 23
    assert memory.num_messages == 23


def test_a_changed_message_finds_nothing() -> None:
    memory = MessageMemory()
    turn(memory, conversation(20))
    edited = conversation(22)
    edited[3]["content"] = "other"
    assert turn(memory, edited) == 0


@pytest.mark.parametrize(("one", "other"), [(1, True), (1, 1.0), ("1", 1), (None, False)])
def test_equal_means_equal_in_type(one: Any, other: Any) -> None:
    memory = MessageMemory()
    messages = conversation(20)
    messages[2]["n"] = one
    turn(memory, messages)
    messages = copy.deepcopy(messages)
    messages[2]["n"] = other
    assert turn(memory, [*messages, message("x")]) == 0


@pytest.mark.parametrize("place", range(20))
def test_a_change_in_any_message_is_seen(place: int) -> None:
    memory = MessageMemory()
    turn(memory, conversation(20))
    edited = conversation(22)
    edited[place]["content"] += "!"
    assert turn(memory, edited) == 0


def test_another_order_of_the_keys_is_another_message() -> None:
    for plain in (message("m2"), {"role": "assistant", "tool_calls": [{"id": "a", "type": "f"}]}):
        memory = MessageMemory()
        messages = conversation(20)
        messages[2] = plain
        turn(memory, messages)
        assert turn(memory, copy.deepcopy(messages)) == 20
        messages[2] = dict(reversed(plain.items()))
        assert turn(memory, [*messages, message("x")]) == 0


def test_a_text_of_another_class_is_left_alone() -> None:
    class Odd(str):
        __slots__ = ()

    assert images_of([*conversation(20), message(Odd("x"))]) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [([1], [True]), ([1], [1.0]), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), ({}, []), ("1", 1)],
)
def test_an_exact_image_tells_types_and_orders_apart(one: Any, other: Any) -> None:
    assert exact_image(one) == exact_image(copy.deepcopy(one)) != exact_image(other)
    assert exact_image([one, object()]) is None


def test_short_strange_and_foreign_conversations_find_nothing() -> None:
    assert images_of(conversation(MIN_MESSAGES - 1)) is None
    assert images_of([*conversation(20), {"content": object()}]) is None
    memory = MessageMemory()
    turn(memory, conversation(20), "a")
    assert turn(memory, conversation(21), "b") == 0
    assert turn(memory, conversation(20 + MAX_NEW_MESSAGES + 1), "a") == 0


def test_parsed_messages_that_do_not_match_one_to_one_are_not_kept() -> None:
    memory = MessageMemory()
    images = images_of(conversation(20))
    assert images is not None
    memory.keep("", images, ["only one"])
    assert memory.find("", images) == NOTHING


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(40, 200), st.integers(2000, 9000))
def test_bounds_hold_and_what_is_found_is_right(
    rng: random.Random, max_messages: int, max_bytes: int
) -> None:
    memory = MessageMemory(max_messages, max_bytes)
    known: list[list[dict[str, Any]]] = [conversation(16)]
    for _ in range(40):
        messages = copy.deepcopy(rng.choice(known))
        if rng.random() < 0.3:
            rng.choice(messages)["content"] = str(rng.random())
        messages += [message(str(rng.random())) for _ in range(rng.randint(0, 4))]
        turn(memory, messages, rng.choice("ab"))
        known.append(messages)
        assert memory.num_messages <= max_messages
        assert memory.num_bytes <= max_bytes
