# SPDX-License-Identifier: Apache-2.0
"""Requests for titles and summaries that come under the session id of a conversation.

They have no tools and no earlier answer. Whatever comes of them, the conversation stays.
"""

import time
from typing import Any

import pytest
from recorded_engine import ALICE, HISTORY, Engine
from test_turn_records import turn_of
from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope

from vllm_stateful.adapters.engine.turn import shape_of
from vllm_stateful.prefix.residency_store import MAX_BRANCHES
from vllm_stateful.schedule.gaps import WaitKind
from vllm_stateful.transport.wire import SHAPE_ACTION
from vllm_stateful.types import Identity, SessionKey, Shape

TITLE = list(range(60, 80))
SESSION = SessionKey(Identity(), ALICE)


def turn(engine: Engine, name: str, prompt: list[int], shape: Shape = Shape.TOOLS) -> list[int]:
    """One turn of Alice to its end; returns the history after it."""
    now_s = time.time()
    request = engine.add(name, prompt, session_id=ALICE, max_tokens=1, arrival_time=now_s)
    request.kv_hints = hinted(shape)
    engine.run()
    return prompt + engine.answer(name)


def hinted(shape: Any) -> KvHintsEnvelope:
    return KvHintsEnvelope("test", "hint", [KvHintAction("0", SHAPE_ACTION, "1", {"shape": shape})])


def test_more_of_them_than_a_session_has_branches_displace_nothing(engine: Engine) -> None:
    history = turn(engine, "first", HISTORY)
    for number in range(MAX_BRANCHES + 2):
        turn(engine, f"title-{number}", [90 - number, *TITLE[:10]], Shape.BARE)
    assert len(engine.branches(ALICE)) == MAX_BRANCHES
    turn(engine, "second", [*history, 1, 2])
    assert turn_of(engine, "second")["outcome"] == "resumed"
    assert turn_of(engine, "second")["missed"]["cause"] == "none"


@pytest.mark.parametrize("shape", [Shape.BARE, Shape.TOOLS])
def test_one_that_shares_much_of_the_history_rewrites_nothing(engine: Engine, shape: Shape) -> None:
    turn(engine, "first", HISTORY)
    (main,) = engine.branches(ALICE)
    turn(engine, "title", [*HISTORY[:18], *TITLE], shape)
    assert main.superseded == (shape is Shape.TOOLS)


def test_the_wait_of_the_conversation_goes_on(engine: Engine) -> None:
    history = turn(engine, "first", HISTORY)
    engine.now = 3.0
    turn(engine, "title", TITLE, Shape.BARE)
    assert engine.store.waits.wait_of(SESSION) is not None
    assert engine.store.waits.num_began[WaitKind.USER] == 1
    engine.now = 7.0
    turn(engine, "second", [*history, 1])
    assert turn_of(engine, "second")["waited_s"] == pytest.approx(7.0, abs=1.0)
    assert turn_of(engine, "title")["waited_s"] is None


def test_its_record_says_what_it_is(engine: Engine) -> None:
    turn(engine, "first", HISTORY)
    turn(engine, "title", [*HISTORY[:18], *TITLE], Shape.BARE)  # enough to start on its KV
    turn(engine, "longer", [*HISTORY, 1, 2, 3])
    record = turn_of(engine, "title")
    assert record["missed"]["cause"] == "side_request"
    assert record["missed"]["num_tokens"] == 0
    assert engine.counts.edits == {}
    assert turn_of(engine, "longer")["missed"]["cause"] == "none"


def test_a_turn_behind_one_is_the_first_of_its_history(engine: Engine) -> None:
    turn(engine, "title", TITLE, Shape.BARE)
    turn(engine, "first", HISTORY)
    assert turn_of(engine, "first")["missed"]["cause"] == "never_seen"


def test_a_conversation_without_tools_has_none_beside_it(engine: Engine) -> None:
    history = turn(engine, "first", HISTORY, Shape.BARE)
    turn(engine, "second", [*history, 1], Shape.OTHER)
    turn(engine, "changed", [*HISTORY[:19], 90, 91, 92], Shape.BARE)
    assert turn_of(engine, "changed")["missed"]["cause"] == "changed"


@pytest.mark.parametrize("shape", [None, 7, [], {}, "round"])
def test_a_shape_that_is_none_says_nothing(shape: Any) -> None:
    class Asked:
        kv_hints = hinted(shape)

    assert shape_of(Asked()) is Shape.OTHER  # type: ignore[arg-type]
