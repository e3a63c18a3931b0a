# SPDX-License-Identifier: Apache-2.0
"""What the API process knows of a turn stays with that turn."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import fields
from typing import Any

import pytest
from test_identity import ALICE, BOB, DAY, FINAL, body, engine_request, http, in_a_task

from vllm_stateful.adapters.frontend.identity import TenantMiddleware, identify, stamp
from vllm_stateful.adapters.frontend.turn_context import (
    NOTHING_KNOWN,
    CacheControl,
    TurnContext,
    begin,
    current,
    enter,
    note_salt,
    plan_of_request,
    prompt_owner,
)

PLAN: Any = object()
"""Stands for a `ToolCallPlan`."""


def over_http(headers: dict[str, str], serve: Callable[[], Any]) -> Any:
    """What a route returns that vLLM serves in a task of its own."""
    made: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        made.append(await serve())

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(TenantMiddleware(app)({"type": "http", "headers": raw}, None, None))
    return made[0]


def test_outside_of_any_request_nothing_is_known() -> None:
    outside = Context()
    assert outside.run(current) is NOTHING_KNOWN
    assert outside.run(prompt_owner) == ("", "")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("", (True, True)),
        ("private, max-age=60", (True, True)),
        ("no-cache", (True, False)),
        ("Max-Age=0", (True, False)),
        ("private, No-Store", (False, False)),
    ],
)
def test_cache_control_is_read_from_its_header(header: str, said: tuple[bool, bool]) -> None:
    found = CacheControl.of({"cache-control": header} if header else {})
    assert (found.is_stored, found.is_looked_up) == said


@pytest.mark.parametrize(("size", "is_known"), [("0", False), ("1M", True)])
def test_cache_control_and_tools_are_read_where_answers_are_kept(
    monkeypatch: pytest.MonkeyPatch, size: str, is_known: bool
) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_RESPONSE_CACHE_BYTES", size)

    async def serve() -> list[TurnContext]:
        sent = [{"tools": []}, {"tools": [{"name": "f"}]}, {"tools": [{"name": "f"}]}]
        return [identify(body(), http({}, each), None).turn for each in sent]

    none, one, again = over_http({"cache-control": "no-cache"}, serve)
    assert one.cache_control == (CacheControl(True, is_looked_up=False) if is_known else None)
    assert (one.tools == b"") != is_known
    assert one.tools == again.tools
    assert (one.tools == none.tools) != is_known


def test_two_requests_of_one_http_request_know_their_own_facts_only() -> None:
    async def serve() -> list[TurnContext]:
        note_salt("salt")
        last = await in_a_task(lambda: identify(body(), http(FINAL, DAY), None))
        other = identify(body(session_id="session-other"), http(ALICE), None)
        made = [enter(found.turn, found) for found in (last, other)]
        assert current() is made[1]
        return [*made, enter(NOTHING_KNOWN, "unidentified")]

    last, other, third = over_http(ALICE, serve)
    assert last.identity.final
    assert last.wish is not None
    assert (other.identity.final, other.wish) == (False, None)
    assert last.tenant == other.tenant == third.tenant != ""
    assert last.salt == "salt"
    about_the_turn = {"identity", "wish", "plan", "tools", "opening", "forced_tool"}
    for field in fields(TurnContext):
        if field.name in about_the_turn:
            assert getattr(third, field.name) == field.default


def test_a_task_outside_of_http_does_not_learn_the_tenant() -> None:
    """Nor does a thread that makes the requests of many."""

    async def serve() -> Any:
        return identify(body(), http(ALICE), None)

    found = over_http(ALICE, serve)
    with ThreadPoolExecutor(1) as thread:
        identified = thread.submit(stamp, engine_request(found)).result()
        unidentified = thread.submit(stamp, engine_request()).result()
    assert identified.cache_salt is not None
    assert unidentified.cache_salt is None


def test_an_unidentified_request_belongs_to_the_tenant_of_its_http_request() -> None:
    async def serve() -> list[str | None]:
        identified = stamp(engine_request(identify(body(), http(BOB), None)))
        return [identified.cache_salt, stamp(engine_request()).cache_salt]

    one, another = over_http(BOB, serve)
    assert one == another is not None


def test_requests_under_one_session_id_find_the_plan_each_by_its_own_id() -> None:
    turn = TurnContext(plan=PLAN)
    is_entered = asyncio.Event()

    async def first() -> None:
        enter(turn, "first")
        await is_entered.wait()
        assert plan_of_request("first") is PLAN
        assert plan_of_request("second") is None

    async def second() -> None:
        enter(turn, "second")
        is_entered.set()
        assert plan_of_request("second") is PLAN

    async def both() -> None:
        await asyncio.gather(first(), second())

    asyncio.run(both())


def test_a_request_without_a_plan_does_not_find_that_of_the_one_before() -> None:
    async def serve() -> None:
        enter(TurnContext(plan=PLAN), "first")
        enter(NOTHING_KNOWN, "second")
        assert plan_of_request("first") is None
        assert plan_of_request("second") is None
        assert plan_of_request(None) is None

    asyncio.run(serve())


def test_the_salt_of_a_prompt_is_known_in_its_task_only() -> None:
    async def render(salt: str) -> tuple[str, str]:
        note_salt(salt)
        await asyncio.sleep(0)
        return prompt_owner()

    async def serve() -> list[tuple[str, str]]:
        begin("alice", None)
        return [*await asyncio.gather(render("one"), render("two")), prompt_owner()]

    assert asyncio.run(serve()) == [("alice", "one"), ("alice", "two"), ("alice", "")]
