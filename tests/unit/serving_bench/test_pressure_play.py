# SPDX-License-Identifier: Apache-2.0
"""The player sends each turn behind the answer to the one before, and shows what failed."""

import json
import time
from typing import Any, Self

import pytest

from benchmarks.serving import pressure_play
from benchmarks.serving.client import Reply, RequestFailedError
from benchmarks.serving.pressure_load import (
    FIRST,
    ONE_SHOT,
    TOOL_TURN,
    Load,
    OneShot,
    Session,
    Turn,
)
from benchmarks.serving.pressure_play import Player

GAP_S = 0.05


class FakeClient:
    """Answers what the request is pinned to; fails where a message says so."""

    bodies: list[dict[str, Any]]

    def __init__(self, host: str, port: int) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def ask(self, body: bytes) -> Reply:
        parsed = json.loads(body)
        self.bodies.append(parsed)
        if parsed["messages"][-1]["content"] == "fail":
            raise RequestFailedError("no")
        now = time.perf_counter()
        return Reply(now, now, now + 0.01, now + 0.02, parsed.get("pinned", "x"), 10, 4, 2)


@pytest.fixture(autouse=True)
def bodies(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    FakeClient.bodies = []
    monkeypatch.setattr(pressure_play, "ChatClient", FakeClient)
    return FakeClient.bodies


def turn(kind: str, says: str, answer: str) -> Turn:
    return Turn(kind, GAP_S, ({"role": "user", "content": says},), answer, 10, 2, 5)


def load(*turns: Turn) -> Load:
    session = Session("s", "c", {"role": "system", "content": "S"}, turns, (), 1.0)
    return Load(1.0, (session,), (OneShot("o", 0.0, "text"),), {})


def pin(answer: str) -> dict[str, Any]:
    return {"pinned": answer}


def test_turns_follow_their_answers(bodies: list[dict[str, Any]]) -> None:
    played = load(turn(FIRST, "hello", "hi"), turn(TOOL_TURN, "result", "done"))
    samples = Player("stock", 1, 3, played, pin).play()
    assert [(s.kind, s.who, s.turn) for s in samples] == [
        (ONE_SHOT, "o", 1),
        (FIRST, "s", 1),
        (TOOL_TURN, "s", 2),
    ]
    assert samples[1].sent_s >= GAP_S
    assert samples[2].sent_s >= samples[1].end_s + GAP_S
    assert all(s.is_equal and not s.error and s.round == 3 for s in samples)
    assert samples[1].ttft_ms == pytest.approx(10)
    assert samples[1].num_computed_tokens == 6
    last = bodies[-1]
    assert [message["content"] for message in last["messages"]] == ["S", "hello", "hi", "result"]
    assert last["session_id"] == "s"
    assert "session_id" not in bodies[0]


def test_another_answer_is_told() -> None:
    samples = Player("stock", 1, 1, load(turn(FIRST, "hello", "hi")), lambda _: {}).play()
    assert [s.is_equal for s in samples] == [True, False]


def test_a_failed_request_ends_its_session() -> None:
    played = load(turn(FIRST, "fail", "hi"), turn(TOOL_TURN, "result", "done"))
    samples = Player("stock", 1, 1, played, pin).play()
    assert [s.error for s in samples] == ["", "RequestFailedError: no"]
