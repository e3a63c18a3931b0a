# SPDX-License-Identifier: Apache-2.0
"""The id of a conversation that no client named."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_stateful.request import conversation_id, id_instead_of
from vllm_stateful.request.session_identity import id_fault

SYSTEM = {"role": "system", "content": "You are an agent."}
QUESTION = {"role": "user", "content": "Why?"}
LATER = [{"role": "assistant", "content": "Because."}, {"role": "user", "content": "And?"}]
CHAT = {"model": "m", "messages": [SYSTEM, QUESTION]}
MESSAGES = {"model": "m", "system": "You are an agent.", "messages": [QUESTION]}
RESPONSES = {"model": "m", "instructions": "You are an agent.", "input": "Why?"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def made(body: dict[str, Any], tenant: str = "") -> str:
    found = conversation_id(body, tenant)
    assert found is not None
    return found


def longer(body: dict[str, Any]) -> dict[str, Any]:
    """The body of a later turn."""
    if "input" in body:
        return {**body, "input": [{"type": "message", **QUESTION}, *LATER]}
    return {**body, "messages": [*body["messages"], *LATER]}


@pytest.mark.parametrize("body", [CHAT, MESSAGES, RESPONSES], ids=["chat", "messages", "responses"])
def test_all_turns_have_one_id_and_it_can_name_a_session(body: dict[str, Any]) -> None:
    first = made(body)
    assert re.fullmatch(r"c-[0-9a-f]{24}", first)
    assert made(longer(body)) == first
    assert id_fault(first) is None


def test_what_changes_from_turn_to_turn_does_not_count() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    parts = [{"type": "text", "text": "Why?", **mark}]
    again = {**MESSAGES, "messages": [{"role": "user", "content": parts}], "temperature": 1}
    again["system"] = [{"type": "text", "text": "You are an agent.", **mark}]
    assert made({**again, "tools": [{"name": "search"}], "stream": True}) == made(MESSAGES)
    picture = {"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]}
    marked = {"role": "user", "content": [{**IMAGE, **mark}, {"type": "text", "text": "What?"}]}
    assert made({"messages": [picture]}) == made({"messages": [marked]})


@pytest.mark.parametrize(
    "other",
    [
        {**CHAT, "model": "n"},
        {**CHAT, "cache_salt": "mine"},
        {**CHAT, "messages": [QUESTION]},
        {**CHAT, "messages": [{**SYSTEM, "role": "developer"}, QUESTION]},
        {**CHAT, "messages": [SYSTEM, {"role": "user", "content": "Why not?"}]},
        {**CHAT, "messages": [SYSTEM, {"role": "user", "content": [IMAGE]}]},
        {"model": "m", "prompt": "Why?"},
        {"model": "m", "prompt": "Why? And?"},
        {"model": "m", "prompt": [1, 2, 3]},
        {"model": "m", "prompt": [1, 2, 4]},
    ],
)
def test_another_conversation_has_another_id(other: dict[str, Any]) -> None:
    ids = [made(CHAT), made(MESSAGES), made(CHAT, "tenant"), made(other), made(other, "tenant")]
    assert len(set(ids)) == len(ids)


def test_long_texts_differ_by_their_ends_and_their_length() -> None:
    def asked(text: str) -> str:
        return made({"messages": [{"role": "user", "content": text}]})

    long = "x" * 100_000
    assert len({asked(long), asked(long + "x"), asked("y" + long[1:]), asked(long[1:] + "y")}) == 4


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": []},
        {"messages": None},
        {"messages": 7},
        {"messages": [[QUESTION], [QUESTION]]},
        {"prompt": ["one", "two"]},
        {"prompt": [[1, 2], [3]]},
        {"prompt": ""},
    ],
)
def test_no_conversation_or_several_have_no_id(body: dict[str, Any]) -> None:
    assert conversation_id(body, "") is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON, JSON, JSON)
def test_nothing_that_a_client_sends_fails_it(turns: Any, system: Any, content: Any) -> None:
    message = {"role": system, "content": content}
    for body in ({"messages": turns, "system": system}, {"input": [message, turns]}):
        found = conversation_id(body, "")
        assert found == conversation_id(body, "")
        assert found is None or id_fault(found) is None


def test_a_body_too_deep_to_be_written_has_an_id() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    assert made({"messages": [{"role": "user", "content": deep}], "cache_salt": deep})
    assert made({"messages": [{"role": deep, "content": [7, deep]}]})


def test_a_name_that_cannot_be_shown_has_an_id_of_its_tenant() -> None:
    ids = {id_instead_of(name, tenant) for name in ("сессия-1", "сессия-2") for tenant in ("", "a")}
    assert len(ids) == 4
    assert id_instead_of("сессия-1", "a") in ids
