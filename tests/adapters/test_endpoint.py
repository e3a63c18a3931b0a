# SPDX-License-Identifier: Apache-2.0
"""`/v1/sessions` and `/v1/turns`: what the engines are asked, and what the client reads."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from recorded_engine import ALICE, HISTORY, Engine
from simulated_engine import SimulatedEngine

from vllm_stateful.adapters.engine.invariants import check_pool
from vllm_stateful.adapters.frontend import session_routes
from vllm_stateful.adapters.frontend.identity import salt_of
from vllm_stateful.config import process_config
from vllm_stateful.session.sentences import explained

SENT = "0a1b2c3d-session-of-mine"
KEY = {"Authorization": "Bearer a-key"}


def answered(*answers: dict[str, Any]) -> tuple[TestClient, list[tuple[str, dict[str, Any]]]]:
    """A client of an app whose engine cores answer so; and what these were asked."""
    asked: list[tuple[str, dict[str, Any]]] = []

    async def call(method: str, operation: str, arguments: dict[str, Any]) -> list[Any]:
        assert method == "stateful"
        asked.append((operation, arguments))
        return list(answers)

    app = FastAPI()
    app.include_router(session_routes.router)
    core = SimpleNamespace(call_utility_all_async=call)
    app.state.engine_client = SimpleNamespace(engine_core=core)
    return TestClient(app), asked


def test_the_clients_own_id_is_looked_for_wherever_it_may_have_sent_it() -> None:
    client, asked = answered({"closed": 1}, {"closed": 2})
    answer = client.delete(f"/v1/sessions/{SENT}", headers=KEY, params={"cache_salt": "s"})
    assert (answer.status_code, answer.json()) == (200, {"session_id": SENT, "closed": 3})
    ((operation, arguments),) = asked
    assert operation == "close"
    assert arguments["cache_salt"] == salt_of({"authorization": "Bearer a-key"}, "s")
    ids = arguments["session_ids"]
    for expected in (SENT, f"codex:{SENT}", f"prompt-cache-key:{SENT}", f"claude-code:{SENT}"):
        assert expected in ids
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("answers", "status", "said"),
    [
        (({"closed": 0},), 404, SENT),
        (({"closed": 0}, {"off": "no caching"}), 404, SENT),
        (({"off": "no caching"}, {"off": "no caching"}), 501, "off: no caching"),
    ],
)
def test_an_error_has_the_form_of_vllms(
    answers: tuple[dict[str, Any], ...], status: int, said: str
) -> None:
    client, _ = answered(*answers)
    answer = client.delete(f"/v1/sessions/{SENT}")
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == status
    assert said in error["message"]


OPERATOR = {"Authorization": "Bearer the-operators-key"}


def served(*engines: SimulatedEngine) -> TestClient:
    """A client of an app over the schedulers of these engines."""

    async def call(method: str, operation: str, arguments: dict[str, Any]) -> list[Any]:
        return [engine.scheduler.stateful(operation, arguments) for engine in engines]

    app = FastAPI()
    app.include_router(session_routes.router)
    core = SimpleNamespace(call_utility_all_async=call)
    app.state.engine_client = SimpleNamespace(engine_core=core)
    return TestClient(app)


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_STATEFUL_ADMIN_KEY", "the-operators-key")
    process_config.cache_clear()
    yield
    process_config.cache_clear()


def salt(headers: dict[str, str]) -> str | None:
    return salt_of({name.lower(): value for name, value in headers.items()}, None)


def test_a_session_is_shown_with_its_turns() -> None:
    engine = Engine(num_blocks=41)
    history = engine.turn("chatcmpl-1", HISTORY, f"codex:{SENT}", cache_salt=salt(KEY))
    engine.turn("chatcmpl-2", [*history[:18], 77, 1], f"codex:{SENT}", cache_salt=salt(KEY))
    client = served(engine)
    (listed,) = client.get("/v1/sessions", headers=KEY).json()["sessions"]
    shown = client.get(f"/v1/sessions/{SENT}", headers=KEY).json()
    assert listed["eviction_place"] is None  # told of one session only
    assert shown == {**listed, "eviction_place": 0}
    assert (shown["turns"], shown["state"]) == (2, "waits_for_user")
    second, first = client.get(f"/v1/sessions/{SENT}/turns", headers=KEY).json()["turns"]
    assert (first["request_id"], second["request_id"]) == ("chatcmpl-1", "chatcmpl-2")
    assert (second["missed"]["cause"], second["missed"]["token"]) == ("changed", 18)
    assert client.get("/v1/turns/chatcmpl-2", headers=KEY).json() == second
    assert client.get("/v1/turns", headers=KEY).json()["turns"] == [second, first]
    assert second["explanation"] == explained(second)
    assert shown["last_turn"] == second


def test_only_the_operator_is_told_of_the_pool(operator: None) -> None:
    """Blocks by session, those that several share, and free ones: they add up over all engines."""
    engines = [Engine(num_blocks=81), Engine(num_blocks=41)]
    history = engines[0].turn("first", HISTORY, "session-one", cache_salt=salt(KEY))
    engines[0].turn("fork", [*history[:14], 5, 6], "session-two", cache_salt=salt(KEY))
    engines[1].turn("other", HISTORY, "session-of-another", cache_salt="another")
    client = served(*engines)
    told = client.get("/v1/sessions", headers=OPERATOR).json()
    pool, sessions = told["pool"], told["sessions"]
    counted = [check_pool(engine.scheduler) for engine in engines]
    assert pool == {
        "total": sum(each["total"] for each in counted),
        "free": sum(each["free"] for each in counted),
        "kept": sum(each["pinned"] for each in counted),
    }
    blocks = {each["session_id"]: (each["blocks"], each["own_blocks"]) for each in sessions}
    shared = 14 // 4
    assert blocks == {
        "session-one": (6, 6 - shared),
        "session-two": (4, 4 - shared),
        "session-of-another": (6, 6),
    }
    assert pool["kept"] == sum(own for _, own in blocks.values()) + shared
    mine = client.get("/v1/sessions", headers=KEY).json()
    assert mine["pool"] is None
    assert {each["own_blocks"] for each in mine["sessions"]} == {None}
    assert {each["session_id"] for each in mine["sessions"]} == {"session-one", "session-two"}


def test_branches_of_one_session_hold_their_blocks_together(operator: None) -> None:
    engine = Engine(num_blocks=81)
    history = engine.turn("first", HISTORY, ALICE, cache_salt=salt(KEY))
    engine.turn("second", [*history[:10], 5, 6, 7, 8, 9], ALICE, cache_salt=salt(KEY))
    (shown,) = served(engine).get("/v1/sessions", headers=OPERATOR).json()["sessions"]
    assert shown["branches"] == 2
    assert shown["own_blocks"] == check_pool(engine.scheduler)["pinned"] < shown["blocks"]


def test_no_block_of_a_running_turn_is_a_sessions_own(operator: None) -> None:
    engine = Engine(num_blocks=81)
    history = engine.turn("first", HISTORY, ALICE, cache_salt=salt(KEY))
    engine.add("second", [*history, 5, 6], session_id=ALICE, cache_salt=salt(KEY), max_tokens=3)
    engine.step()
    (shown,) = served(engine).get("/v1/sessions", headers=OPERATOR).json()["sessions"]
    assert (shown["state"], shown["own_blocks"]) == ("running", 0)


def test_nobody_sees_what_has_another_key(operator: None) -> None:
    """Nor learns that it exists. The operator sees all."""
    engine = Engine(num_blocks=81)
    other = {"x-api-key": "planted-key"}
    engine.turn("planted-request", HISTORY, "planted-session", cache_salt=salt(other))
    engine.turn("mine-1", [7, *HISTORY], "session-of-mine", cache_salt=salt(KEY))
    client = served(engine)
    asked = [
        "/v1/sessions",
        "/v1/turns",
        "/v1/sessions/session-of-mine",
        "/v1/sessions/session-of-mine/turns",
        "/v1/turns/mine-1",
    ]
    for headers in (KEY, {}):
        for path in asked:
            assert "planted" not in client.get(path, headers=headers).text
        for path in ("sessions/planted-session", "sessions/planted-session/turns"):
            assert client.get(f"/v1/{path}", headers=headers).status_code == 404
        assert client.get("/v1/turns/planted-request", headers=headers).status_code == 404
    assert client.get("/v1/sessions", headers={}).json()["sessions"] == []
    assert client.get("/v1/turns/planted-request", headers=OPERATOR).status_code == 200
    sessions = client.get("/v1/sessions", headers=OPERATOR).json()["sessions"]
    assert {each["session_id"] for each in sessions} == {"planted-session", "session-of-mine"}


def test_without_an_operators_key_no_key_sees_all() -> None:
    engine = Engine(num_blocks=81)
    engine.turn("first", HISTORY, "session-of-one", cache_salt=salt(KEY))
    for headers in (OPERATOR, {}, {"Authorization": "Bearer "}):
        told = served(engine).get("/v1/sessions", headers=headers).json()
        assert told == {"sessions": [], "pool": None}


@pytest.mark.parametrize("num_engines", [1, 2])
def test_sessions_are_listed_in_pages(num_engines: int) -> None:
    engines = [Engine(num_blocks=81) for _ in range(num_engines)]
    for number in range(6):
        engine = engines[number % num_engines]
        engine.now = float(number)
        engine.turn(f"turn-{number}", [number, *HISTORY], f"session-{number:03}")
    for engine in engines:
        engine.now = 10.0
    client = served(*engines)
    names = []
    for skip in range(0, 8, 2):
        page = client.get("/v1/sessions", params={"limit": 2, "skip": skip}).json()["sessions"]
        names += [each["session_id"] for each in page]
    assert names == [f"session-{number:03}" for number in range(5, -1, -1)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"limit": 0},
        {"limit": -1},
        {"limit": 201},
        {"limit": "many"},
        {"skip": -1},
        {"skip": 1 << 70},
    ],
)
def test_a_limit_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    assert served().get("/v1/sessions", params=wrong).status_code == 422


def test_an_engine_that_keeps_no_sessions_says_so() -> None:
    client, _ = answered({"off": "no caching"})
    for path in ("sessions", "turns", "sessions/x-session", "turns/x", "sessions/x-session/turns"):
        answer = client.get(f"/v1/{path}")
        assert (answer.status_code, answer.json()["error"]["message"]) == (501, "off: no caching")


def test_the_routes_have_types() -> None:
    app = FastAPI()
    app.include_router(session_routes.router)
    schemas = app.openapi()["components"]["schemas"]
    assert {"Sessions", "Session", "Turns", "Turn", "Missed", "Closed"} <= schemas.keys()
