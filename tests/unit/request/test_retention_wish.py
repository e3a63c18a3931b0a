# SPDX-License-Identifier: Apache-2.0
"""Wishes in the bodies that clients send, and in hints."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_stateful.request.retention_wish import (
    MAX_SECONDS,
    RetentionWish,
    cache_creation,
    hinted_seconds,
    retention_wish,
    with_seconds,
)
from vllm_stateful.types import HintSource

FIVE_MINUTES = RetentionWish(300.0, "5m")
ONE_HOUR = RetentionWish(3600.0, "1h")
DAY = RetentionWish(86_400.0)


def control(ttl: Any = None) -> dict[str, Any]:
    """What stands at a breakpoint."""
    return {"cache_control": {"type": "ephemeral"} | ({} if ttl is None else {"ttl": ttl})}


def text(**extra: Any) -> dict[str, Any]:
    return {"type": "text", "text": "hi", **extra}


def asked(*blocks: Any, **message: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks), **message}]}


TOOL_RESULT = {"type": "tool_result", "tool_use_id": "a"}

PLACES: dict[str, dict[str, Any]] = {
    "request": control("1h"),
    "system": {"system": [text(), text(**control("1h"))]},
    "tool": {"tools": [{"name": "f"}, {"name": "g", **control("1h")}]},
    "block": asked(text(**control("1h")), text()),
    "tool result": asked({**TOOL_RESULT, "content": "x", **control("1h")}),
    "inside a tool result": asked({**TOOL_RESULT, "content": [text(), text(**control("1h"))]}),
    "chat: message": {"messages": [{"role": "user", "content": "hi", **control("1h")}]},
    "chat: message without content": {"messages": [{"role": "assistant", **control("1h")}]},
    "chat: function": {"tools": [{"type": "function", "function": {"name": "f", **control("1h")}}]},
    "responses: part": {"input": [{"role": "user", "content": [text(**control("1h"))]}]},
}


@pytest.mark.parametrize("place", PLACES)
def test_places_of_a_breakpoint(place: str) -> None:
    assert retention_wish({"model": "m", **PLACES[place]}) == ONE_HOUR


@pytest.mark.parametrize(
    ("breakpoint", "wish"),
    [
        (control(), FIVE_MINUTES),
        (control("5m"), FIVE_MINUTES),
        (control("1h"), ONE_HOUR),
        ({"cache_control": {"type": "ephemeral", "ttl": None}}, FIVE_MINUTES),
        (control("2h"), None),
        (control(3600), None),
        (control(["1h"]), None),
        ({"cache_control": {"ttl": "1h"}}, None),
        ({"cache_control": {"type": "persistent", "ttl": "1h"}}, None),
        ({"cache_control": "1h"}, None),
        ({"cache_control": None}, None),
        ({}, None),
    ],
)
def test_what_stands_at_a_breakpoint(
    breakpoint: dict[str, Any], wish: RetentionWish | None
) -> None:
    assert retention_wish(asked(text(**breakpoint))) == wish


@pytest.mark.parametrize("first", ["5m", "1h"])
def test_the_longest_of_several_counts_in_whatever_order(first: str) -> None:
    last = "1h" if first == "5m" else "5m"
    assert retention_wish(asked(text(**control(first)), text(**control(last)))) == ONE_HOUR
    assert retention_wish({**asked(text(**control(first))), **control(last)}) == ONE_HOUR


def test_one_that_cannot_be_read_does_not_hide_another() -> None:
    assert retention_wish(asked(text(**control("9d")), text(**control()))) == FIVE_MINUTES


@pytest.mark.parametrize(
    ("retention", "wish"),
    [
        ("24h", DAY),
        ("in_memory", RetentionWish(600.0)),
        ("in-memory", RetentionWish(600.0)),
        ("48h", None),
        ("", None),
        (86_400, None),
        (["24h"], None),
        (None, None),
    ],
)
def test_prompt_cache_retention(retention: Any, wish: RetentionWish | None) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "prompt_cache_retention": retention}
    assert retention_wish(body) == wish


def test_of_both_kinds_the_longer_counts_and_the_breakpoint_is_known() -> None:
    body = asked(text(**control()))
    assert retention_wish({**body, "prompt_cache_retention": "24h"}) == RetentionWish(86_400, "5m")
    assert retention_wish({**control("1h"), "prompt_cache_retention": "in_memory"}) == ONE_HOUR


@pytest.mark.parametrize(
    "body",
    [
        {"metadata": control("1h")},
        asked({"type": "tool_use", "id": "a", "name": "f", "input": control("1h")}),
        {"tools": [{"name": "f", "input_schema": {"properties": control("1h")}}]},
        asked(text(text=json.dumps(control("1h")))),
    ],
)
def test_the_same_words_elsewhere_are_no_wish(body: dict[str, Any]) -> None:
    assert retention_wish(body) is None


KEYS = st.sampled_from(
    ["cache_control", "type", "ttl", "system", "tools", "function", "messages", "input", "content"]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
WORDS = st.sampled_from(["ephemeral", "5m", "1h", "24h", "in_memory", "cache_control"])
JSON = st.recursive(
    LEAVES | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
)


@given(
    body=st.dictionaries(KEYS | st.just("prompt_cache_retention"), JSON, max_size=5) | JSON,
)
def test_no_body_raises(body: Any) -> None:
    wish = retention_wish(body)
    assert wish is None or 0 < wish.seconds <= MAX_SECONDS


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"content": st.lists(st.sampled_from([None, "5m", "1h"]), max_size=3)},
        optional={"at": st.sampled_from(["5m", "1h"])},
    ),
    max_size=4,
)


@given(messages=MESSAGES)
def test_the_wish_is_the_longest_of_all_messages(messages: list[dict[str, Any]]) -> None:
    body = {
        "messages": [
            {
                "role": "user",
                "content": [text(**(control(ttl) if ttl else {})) for ttl in message["content"]],
                **(control(message["at"]) if "at" in message else {}),
            }
            for message in messages
        ]
    }
    ttls = {ttl for message in messages for ttl in [*message["content"], message.get("at")]}
    expected = ONE_HOUR if "1h" in ttls else FIVE_MINUTES if "5m" in ttls else None
    assert retention_wish(body) == expected


@pytest.mark.parametrize(
    ("payload", "seconds"),
    [
        ({"seconds": 60}, 60.0),
        ({"seconds": 0.5}, 0.5),
        ({"seconds": 86_401}, 86_400.0),
        ({"seconds": 10**400}, 86_400.0),
        ({"seconds": 0}, None),
        ({"seconds": -1}, None),
        ({"seconds": float("inf")}, None),
        ({"seconds": float("nan")}, None),
        ({"seconds": True}, None),
        ({"seconds": "60"}, None),
        ({"seconds": None}, None),
        ({}, None),
        (None, None),
        ([60], None),
    ],
)
def test_a_hint(payload: Any, seconds: float | None) -> None:
    assert hinted_seconds(payload) == seconds


@given(payload=JSON | st.fixed_dictionaries({"seconds": LEAVES}))
def test_no_hint_raises(payload: Any) -> None:
    seconds = hinted_seconds(payload)
    assert seconds is None or 0 < seconds <= MAX_SECONDS


def test_all_written_tokens_count_under_the_longest_time() -> None:
    assert cache_creation("1h", 7) == {
        "ephemeral_5m_input_tokens": 0,
        "ephemeral_1h_input_tokens": 7,
    }
    assert cache_creation("5m", 7) == {
        "ephemeral_5m_input_tokens": 7,
        "ephemeral_1h_input_tokens": 0,
    }


def test_a_long_conversation_is_looked_through_in_a_fraction_of_reading_it() -> None:
    """0.14 ms of 3 ms, on the machine where this was written."""
    turn = [
        {"role": "assistant", "content": [text(text="t" * 500), text(text="x" * 600)]},
        {"role": "user", "content": [{**TOOL_RESULT, "content": [text(text='r "q" ' * 280)]}]},
    ]
    raw = json.dumps({"messages": turn * 200, "system": [text(**control())]})
    body = json.loads(raw)

    def best(call: Any) -> float:
        times = []
        for _ in range(20):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return min(times)

    assert retention_wish(body) == FIVE_MINUTES
    assert best(lambda: retention_wish(body)) < best(lambda: json.loads(raw)) / 4


@pytest.mark.parametrize(
    ("options", "wish"),
    [
        ({"ttl": "30m"}, RetentionWish(1800.0)),
        ({"ttl": "12h", "mode": "explicit"}, RetentionWish(43_200.0)),
        ({"ttl": "1h"}, None),
        ({"ttl": 30}, None),
        ({"ttl": None}, None),
        ({}, None),
        ("30m", None),
        (None, None),
    ],
)
def test_the_ttl_of_prompt_cache_options_is_a_wish(
    options: Any, wish: RetentionWish | None
) -> None:
    assert retention_wish({"prompt_cache_options": options}) == wish
    longer = retention_wish({"prompt_cache_options": options, "prompt_cache_retention": "24h"})
    assert longer == RetentionWish(86_400.0)


@pytest.mark.parametrize(
    ("body", "sources"),
    [
        ({"cache_control": {"type": "ephemeral", "ttl": "2h"}}, {HintSource.CACHE_CONTROL}),
        ({"cache_control": 7}, {HintSource.CACHE_CONTROL}),
        ({"cache_control": None}, set()),
        ({"cache_control": {"type": "ephemeral"}}, set()),
        ({"prompt_cache_retention": "for ever"}, {HintSource.CACHE_RETENTION}),
        ({"prompt_cache_retention": ["24h"]}, {HintSource.CACHE_RETENTION}),
        ({"prompt_cache_retention": None}, set()),
        ({"prompt_cache_options": {"ttl": "1y"}}, {HintSource.CACHE_OPTIONS}),
        ({"prompt_cache_options": "30m"}, {HintSource.CACHE_OPTIONS}),
        ({"prompt_cache_options": {"mode": "auto"}}, set()),
    ],
)
def test_what_cannot_be_read_is_told_by_its_source(
    body: dict[str, Any], sources: set[HintSource]
) -> None:
    ignored: set[HintSource] = set()
    retention_wish(body, ignored)
    assert ignored == sources


def test_the_longer_of_two_wishes_counts() -> None:
    wish = RetentionWish(300.0, "5m")
    assert with_seconds(wish, 600.0) == RetentionWish(600.0, "5m")
    assert with_seconds(wish, 60.0) == wish
    assert with_seconds(None, 60.0) == RetentionWish(60.0)
    assert with_seconds(None, None) is None
