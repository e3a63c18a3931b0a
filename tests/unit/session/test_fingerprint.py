# SPDX-License-Identifier: Apache-2.0
"""Fingerprints: a history that grows is no change, and any edit is found where it lies."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_stateful.session.fingerprint import (
    Change,
    Fingerprint,
    Reason,
    compare,
    of_chat,
    of_messages,
    of_responses,
)

MAKERS = {"messages": of_messages, "chat": of_chat, "responses": of_responses}

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
TEXT = st.text(min_size=1, max_size=20)
BLOCK = st.builds(lambda text: {"type": "text", "text": text}, TEXT) | st.builds(
    lambda said: {"type": "tool_use", "id": "a", "name": "f", "input": said}, PLAIN
)
MESSAGE = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["user", "assistant", "tool"]),
    TEXT | st.lists(BLOCK, min_size=1, max_size=3),
)
TOOL = st.builds(lambda name, said: {"name": name, "input_schema": said}, TEXT, PLAIN)
BODY = st.fixed_dictionaries(
    {
        "model": TEXT,
        "messages": st.lists(MESSAGE, min_size=1, max_size=6),
        "tools": st.lists(TOOL, max_size=3),
    },
    optional={"system": TEXT | st.lists(BLOCK, min_size=1, max_size=2), "tool_choice": PLAIN},
)


def made(api: str, body: dict[str, Any]) -> Fingerprint:
    """Of the body in the API's own words, after a trip through JSON."""
    said = json.loads(json.dumps(body))
    if api != "messages" and "system" in said:
        said["instructions"] = said.pop("system")
    if api == "responses":
        said["input"] = said.pop("messages")
    return MAKERS[api](said)


@given(st.sampled_from(sorted(MAKERS)), BODY, st.lists(MESSAGE, max_size=4))
def test_a_history_that_grows_is_no_change(api: str, body: dict[str, Any], more: list[Any]) -> None:
    later = {**body, "messages": body["messages"] + more}
    assert compare(made(api, body), made(api, later)) is None


EDITS = {
    "model": (Reason.MODEL, Reason.MODEL),
    "system": (Reason.SYSTEM, Reason.INPUT),
    "tools": (Reason.TOOLS, Reason.TOOLS),
    "messages": (Reason.MESSAGES, Reason.INPUT),
}


@given(st.sampled_from(["messages", "responses"]), BODY, st.data())
def test_any_edit_is_found_in_its_class(api: str, body: dict[str, Any], data: Any) -> None:
    part = data.draw(st.sampled_from(sorted(EDITS)))
    later = copy.deepcopy(body)
    if part == "messages":
        place = data.draw(st.integers(0, len(body["messages"]) - 1))
        how = data.draw(st.sampled_from(["other", "gone", "before"]))
        other = {"role": "user", "content": "\x00 another"}
        if how == "before":
            later["messages"].insert(place, other)
        elif how == "other":
            later["messages"][place] = other
        else:
            del later["messages"][-1]
    elif part == "tools":
        later["tools"].append({"name": "\x00 another"})
    else:
        later[part] = "\x00 another"
    found = compare(made(api, body), made(api, later))
    assert found is not None
    assert found.reason is EDITS[part][api == "responses"]
    assert 0.0 < found.share <= 1.0


@given(BODY, st.data())
def test_breakpoints_may_move(body: dict[str, Any], data: Any) -> None:
    later, mark = copy.deepcopy(body), {"cache_control": {"type": "ephemeral"}}
    message = data.draw(st.sampled_from(later["messages"]))
    if isinstance(message["content"], str):
        message["content"] = [{"type": "text", "text": message["content"], **mark}]
    else:
        message["content"][-1].update(mark)
    for tool in later["tools"]:
        tool.update(mark)
    if isinstance(later.get("system"), str):
        later["system"] = [{"type": "text", "text": later["system"], **mark}]
    assert compare(made("messages", body), made("messages", later)) is None


def test_what_a_tool_is_called_with_is_no_breakpoint() -> None:
    def with_input(said: dict[str, Any]) -> Fingerprint:
        block = {"type": "tool_use", "id": "a", "name": "f", "input": said}
        return of_messages({"messages": [{"role": "assistant", "content": [block]}]})

    found = compare(with_input({"cache_control": 1}), with_input({"cache_control": 2}))
    assert found is not None
    assert found.reason is Reason.MESSAGES


def test_the_order_of_keys_counts_in_a_schema_but_not_in_a_message() -> None:
    def of(*, swapped: bool) -> dict[str, Any]:
        message = [("role", "user"), ("content", "hi")]
        return {"messages": [dict(message[::-1] if swapped else message)]}

    assert compare(of_messages(of(swapped=False)), of_messages(of(swapped=True))) is None
    schemas = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    one, two = (of_messages({"tools": [{"name": "f", "input_schema": each}]}) for each in schemas)
    assert compare(one, two) == Change(Reason.TOOLS)


ORDER = [
    ("model", "m2", Reason.MODEL),
    ("speed", "fast", Reason.MODEL),
    ("system", "other", Reason.SYSTEM),
    ("tools", [{"name": "g"}], Reason.TOOLS),
    ("tool_choice", {"type": "any"}, Reason.UNKNOWN),
    ("thinking", {"type": "enabled", "budget_tokens": 9}, Reason.UNKNOWN),
    ("messages", [{"role": "user", "content": "other"}], Reason.MESSAGES),
]


@pytest.mark.parametrize("first", range(len(ORDER)))
def test_the_first_of_several_differences_is_told(first: int) -> None:
    body = {"model": "m", "system": "s", "messages": [{"role": "user", "content": "hi"}]}
    later = {**body, **{name: value for name, value, _ in ORDER[first:]}}
    found = compare(of_messages(body), of_messages(later))
    assert found is not None
    assert found.reason is ORDER[first][2]


OPENAI_ORDER = [
    ({"model": "m2"}, Reason.MODEL),
    ({"prompt_cache_key": "k2"}, Reason.KEY),
    ({"service_tier": "flex"}, Reason.TIER),
    ({"tools": [{"type": "function", "name": "g"}]}, Reason.TOOLS),
    ({"text": {"format": {"type": "json_object"}, "verbosity": "low"}}, Reason.FORMAT),
    ({"reasoning": {"effort": "low"}}, Reason.EFFORT),
    ({"text": {"verbosity": "low"}}, Reason.VERBOSITY),
    ({"input": [{"type": "compaction", "encrypted_content": "x"}]}, Reason.COMPACTED),
    ({"instructions": "other"}, Reason.INPUT),
    ({"input": "other"}, Reason.INPUT),
]


@pytest.mark.parametrize("first", range(len(OPENAI_ORDER)))
def test_the_reasons_of_openai_come_in_their_order(first: int) -> None:
    body: dict[str, Any] = {"model": "m", "instructions": "s", "input": "hi"}
    later = dict(body)
    for change, _ in reversed(OPENAI_ORDER[first:]):
        later.update(change)
    found = compare(of_responses(body), of_responses(later))
    assert found is not None
    assert found.reason is OPENAI_ORDER[first][1]


def test_a_default_that_is_said_is_no_change() -> None:
    said = {"service_tier": "auto", "text": {"format": {"type": "text"}, "verbosity": "medium"}}
    listed = [{"type": "message", "role": "user", "content": "hi"}]
    body = {"model": "m", "input": "hi"}
    later = {**body, **said, "tools": [], "input": listed}
    assert compare(of_responses(body), of_responses(later)) is None


def test_what_claude_code_says_of_itself_at_each_request_is_no_change() -> None:
    def of(number: int) -> Fingerprint:
        header = {"type": "text", "text": f"x-anthropic-billing-header: cch={number}"}
        return of_messages({"system": [header, {"type": "text", "text": "You are"}]})

    assert compare(of(1), of(2)) is None


def test_the_set_of_betas_counts_but_not_their_order() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    one = of_messages(body, ["a, b", "cache-diagnosis-2026-04-07"])
    assert compare(one, of_messages(body, ["b,a"])) is None
    assert compare(one, of_messages(body, ["a"])) == Change(Reason.UNKNOWN)


def test_only_what_lies_behind_the_difference_is_missed() -> None:
    history = [{"role": "user", "content": letter * 1000} for letter in "abcd"]
    edited = [*history[:3], {"role": "user", "content": "x"}]
    found = compare(of_messages({"messages": history}), of_messages({"messages": edited}))
    assert found is not None
    assert found.tokens_behind(400) == pytest.approx(100, abs=2)
    assert Change(Reason.MODEL).tokens_behind(400) == 400


def test_nothing_that_was_said_is_kept() -> None:
    body = {"model": "secret", "system": "secret", "messages": [{"role": "u", "content": "secret"}]}
    fingerprint = of_messages(body)
    assert "secret" not in repr(fingerprint)
    assert len(fingerprint.items) == 8
    assert fingerprint.num_bytes < 2000


@given(PLAIN, st.sampled_from(sorted(MAKERS)))
def test_any_json_has_a_fingerprint(value: Any, api: str) -> None:
    names = ("model", "system", "tools", "messages", "input", "text", "reasoning", "instructions")
    for name in names:
        MAKERS[api]({name: value})
    MAKERS[api]({"messages": [value], "input": [value], "tools": [value]})
