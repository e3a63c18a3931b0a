# SPDX-License-Identifier: Apache-2.0
"""``--stateful-order least-served``: who is admitted next, step by step."""

import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from lifecycle import AgentSessions
from recorded_engine import ALICE, BOB, HISTORY, Engine
from simulated_engine import expected_answer, vllm_config
from test_lifecycle_model import AgentSessionsAsync
from vllm.v1.core.sched.request_queue import FCFSRequestQueue, PriorityRequestQueue

from vllm_stateful.adapters.engine import scheduler
from vllm_stateful.errors import UnsupportedError
from vllm_stateful.schedule import service_order
from vllm_stateful.schedule.service_order import MAX_WAIT_S, OUTPUT_WEIGHT
from vllm_stateful.types import Identity, SessionKey

CAROL = "session-carol"


@pytest.fixture(autouse=True)
def least_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels as wide as the turns of these tests: one turn of ALICE leads out of the first."""
    monkeypatch.setenv("VLLM_STATEFUL_ORDER", "least-served")
    monkeypatch.setattr(service_order, "FIRST_LEVEL", 16)


def start(options: dict[str, Any], **more: Any) -> Engine:
    """An engine whose waiting queue runs on the clock of the test."""
    engine = Engine(**{"max_num_seqs": 1, **options, **more})
    if engine.scheduler.by_service is not None:
        engine.scheduler.by_service._clock = lambda: engine.now
    return engine


def admitted(engine: Engine) -> list[str]:
    """Requests in the order in which they were first scheduled."""
    return list(dict.fromkeys(r for o in engine.outputs for r in o.num_scheduled_tokens))


def play(engine: Engine) -> list[str]:
    """Run to the end. Returns who was admitted, in order."""
    engine.outputs.clear()
    engine.run()
    order = admitted(engine)
    engine.check_nothing_is_lost()
    return order


def served(engine: Engine, session_id: str) -> int:
    return int(engine.scheduler.by_service._book.served(SessionKey(Identity(), session_id)))


# ---- order of admission ----------------------------------------------------------------------


@pytest.mark.parametrize("order", ["arrival", "least-served"])
def test_a_new_program_overtakes_one_that_was_served_more(
    options: dict[str, Any], order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_ORDER", order)
    engine = start(options)
    history = engine.turn("first", HISTORY)
    engine.add("alice", [*history, 1], session_id=ALICE)
    engine.add("bob", [50, 51], session_id=BOB)
    engine.add("nobody", [60, 61])
    stays = order == "arrival"
    assert isinstance(engine.scheduler.waiting, FCFSRequestQueue) is stays
    expected = ["alice", "bob", "nobody"] if stays else ["bob", "nobody", "alice"]
    assert play(engine) == expected
    assert engine.answer("alice") == expected_answer([*history, 1], 4)


def test_a_turn_that_has_waited_long_enough_goes_first(options: dict[str, Any]) -> None:
    engine = start(options)
    history = engine.turn("first", HISTORY)
    engine.add("alice", [*history, 1], session_id=ALICE)
    engine.now += MAX_WAIT_S
    engine.add("bob", [50, 51], session_id=BOB)
    assert play(engine) == ["alice", "bob"]


def test_a_long_program_is_admitted_while_new_ones_keep_coming(options: dict[str, Any]) -> None:
    engine = start(options)
    history = engine.turn("first", HISTORY)
    engine.outputs.clear()
    engine.add("alice", [*history, 1], session_id=ALICE)
    for number in itertools.count():
        if "alice" in admitted(engine):
            break
        engine.add(f"new-{number}", [number, 7], max_tokens=1)
        engine.now += 1.0
        engine.step()
    assert engine.now <= MAX_WAIT_S + 2 * engine.depth
    engine.run()
    assert engine.answer("alice") == expected_answer([*history, 1], 4)
    engine.check_nothing_is_lost()


def test_a_program_with_many_turns_at_once_waits_for_others_after_the_first(
    options: dict[str, Any],
) -> None:
    engine = start(options)
    for number in range(3):
        engine.add(f"alice-{number}", [number, *HISTORY], session_id=ALICE)
    engine.add("bob", [50, *HISTORY], session_id=BOB)
    assert play(engine) == ["alice-0", "bob", "alice-1", "alice-2"]


def test_turns_are_admitted_in_order_as_long_as_there_is_room(options: dict[str, Any]) -> None:
    engine = start(options, max_num_seqs=8)
    history = engine.turn("first", HISTORY)
    engine.add("alice", [*history, 1], session_id=ALICE)
    engine.add("bob", [50, *HISTORY], session_id=BOB)
    engine.outputs.clear()
    engine.step()
    assert list(engine.outputs[0].num_scheduled_tokens) == ["bob", "alice"]
    play(engine)


# ---- what is counted -------------------------------------------------------------------------


def test_what_is_reused_costs_nothing(options: dict[str, Any]) -> None:
    engine = start(options)
    history = engine.turn("first", HISTORY)
    first = len(HISTORY) + OUTPUT_WEIGHT
    assert served(engine, ALICE) == first
    engine.turn("second", [*history, 1, 2, 3], max_tokens=5)
    assert served(engine, ALICE) == first + 4 + 5 * OUTPUT_WEIGHT
    engine.turn("fork", [*history, 9], BOB)
    assert served(engine, BOB) == 1 + OUTPUT_WEIGHT
    engine.check_nothing_is_lost()


def test_tenants_with_the_same_id_are_two_programs(options: dict[str, Any]) -> None:
    engine = start(options)
    engine.turn("first", HISTORY, cache_salt="tenant-a")
    assert served(engine, ALICE) == 0
    engine.add("a", HISTORY, session_id=ALICE, cache_salt="tenant-a")
    engine.add("b", HISTORY, session_id=ALICE, cache_salt="tenant-b")
    assert play(engine) == ["b", "a"]


@pytest.mark.parametrize("session_id", [None, "short", "undefined"])
def test_turns_without_a_usable_id_are_not_remembered(
    options: dict[str, Any], session_id: str | None
) -> None:
    engine = start(options)
    engine.turn("first", HISTORY, session_id)
    assert len(engine.scheduler.by_service._book) == 0
    engine.check_nothing_is_lost()


def test_an_aborted_turn_is_counted_up_to_there_and_one_that_waited_is_not(
    options: dict[str, Any],
) -> None:
    engine = start(options)
    running = engine.add("running", HISTORY, session_id=ALICE, max_tokens=50)
    engine.add("waiting", HISTORY, session_id=BOB)
    for _ in range(6):
        engine.step()
    num_output = running.num_output_tokens
    assert 0 < num_output < 50
    engine.abort("running")
    engine.abort("waiting")
    assert served(engine, ALICE) == len(HISTORY) + num_output * OUTPUT_WEIGHT
    assert served(engine, BOB) == 0
    assert play(engine) == []


# ---- what interrupts -------------------------------------------------------------------------


def test_a_preempted_turn_comes_back_before_all_that_wait(options: dict[str, Any]) -> None:
    """Two turns outgrow the pool: the later one is preempted, and not overtaken by a new one."""
    engine = start(options, num_blocks=18, max_num_seqs=2)
    prompts = {"alice": [1, *HISTORY[:13]], "bob": [2, *HISTORY[:13]]}
    for request_id, prompt in prompts.items():
        engine.add(request_id, prompt, session_id=f"session-{request_id}", max_tokens=30)
    while not engine.finished["bob"].num_preemptions:
        engine.step()
    assert engine.scheduler.waiting.peek_request() is engine.finished["bob"]
    engine.add("new", [3, 4], session_id=CAROL)
    assert [r.request_id for r in engine.scheduler.waiting] == ["bob", "new"]
    assert len(engine.scheduler.waiting) == 2
    before = served(engine, BOB)
    engine.outputs.clear()
    engine.run()
    order = [r for r in admitted(engine) if r != "alice"]
    assert order == ["bob", "new"]
    for request_id, prompt in prompts.items():
        assert engine.answer(request_id) == expected_answer(prompt, 30)
    assert served(engine, BOB) == before + 30 * OUTPUT_WEIGHT == 14 + 30 * OUTPUT_WEIGHT
    engine.check_nothing_is_lost()


def test_running_turns_that_a_reset_preempts_keep_their_order(options: dict[str, Any]) -> None:
    engine = start(options, max_num_seqs=3)
    for name in ("alice", "bob", "carol"):
        engine.add(name, HISTORY, session_id=f"session-{name}", max_tokens=8)
    for _ in range(3):
        engine.step()
    while engine.in_flight:
        engine.scheduler.update_from_output(*engine.in_flight.popleft())
    engine.add("new", [50], session_id="session-new")
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    waiting = [r.request_id for r in engine.scheduler.waiting]
    assert waiting == ["alice", "bob", "carol", "new"]
    assert play(engine) == waiting


def test_a_turn_that_cannot_run_yet_goes_back_to_its_place(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its grammar compiles, say. It is passed over, and what arrives is not before it for that."""
    engine = start(options)
    history = engine.turn("first", HISTORY)
    ready = engine.scheduler._handle_blocked_waiting_request
    blocked = {"bob", "alice"}
    monkeypatch.setattr(
        engine.scheduler,
        "_handle_blocked_waiting_request",
        lambda request: request.request_id not in blocked and ready(request),
    )
    engine.add("alice", [*history, 1], session_id=ALICE)
    engine.add("bob", [50, 51], session_id=BOB)
    for _ in range(100):
        engine.step()
        assert [r.request_id for r in engine.scheduler.waiting] == ["bob", "alice"]
    engine.add("carol", [60, 61], session_id=CAROL, max_tokens=1)
    assert [r.request_id for r in engine.scheduler.waiting] == ["bob", "carol", "alice"]
    engine.outputs.clear()
    while not engine.finished["carol"].is_finished():
        engine.step()
    blocked.clear()
    engine.run()
    assert admitted(engine) == ["carol", "bob", "alice"]
    engine.check_nothing_is_lost()


def test_a_turn_that_goes_away_while_it_waits_is_not_admitted(options: dict[str, Any]) -> None:
    engine = start(options)
    history = engine.turn("first", HISTORY)
    engine.add("running", [70, 71], max_tokens=20)
    engine.step()
    engine.add("alice", [*history, 1], session_id=ALICE)
    engine.add("bob", [50, 51], session_id=BOB)
    engine.add("carol", [60, 61], session_id=CAROL)
    assert engine.scheduler.waiting.peek_request().request_id == "bob"
    engine.abort("bob")
    assert engine.scheduler.get_num_unfinished_requests() == 3
    assert play(engine) == ["running", "carol", "alice"]
    assert not engine.scheduler.waiting


def test_the_head_that_finds_no_room_is_overtaken_only_until_its_time_has_come(
    options: dict[str, Any],
) -> None:
    engine = start(options, max_num_seqs=4, max_batched=256)
    engine.turn("first", HISTORY)
    engine.outputs.clear()
    engine.add("running", [70, *HISTORY, *HISTORY, *HISTORY], max_tokens=40)
    engine.step()
    engine.add("big", [(7 * n) % 100 for n in range(130)], session_id=ALICE)
    for _ in range(3):
        engine.step()
    assert engine.scheduler.waiting.peek_request().request_id == "big"
    engine.add("soon", [60, 61], session_id=CAROL)
    for _ in range(3):
        engine.step()
    assert admitted(engine) == ["running", "soon"]
    engine.now += MAX_WAIT_S
    engine.add("late", [80, 81], session_id=BOB)
    engine.run()
    assert admitted(engine) == ["running", "soon", "big", "late"]
    engine.check_nothing_is_lost()


# ---- what wins over it -----------------------------------------------------------------------


def test_priorities_that_were_asked_for_win(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    monkeypatch.setattr(scheduler.logger, "warning", lambda text, *a: texts.append(text % a))
    monkeypatch.setattr(vllm_config(4, 1, 64).scheduler_config, "policy", "priority")
    engine = start(options)
    assert isinstance(engine.scheduler.waiting, PriorityRequestQueue)
    assert "stateful: --scheduling-policy priority decides, not --stateful-order" in texts
    history = engine.turn("first", HISTORY)
    engine.add("late", [50, 51], session_id=BOB, priority=5, arrival_time=1.0)
    engine.add("early", [*history, 1], session_id=ALICE, priority=0, arrival_time=2.0)
    assert play(engine) == ["early", "late"]


def test_priorities_and_service_together_are_refused_when_strict(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_STRICT", "1")
    monkeypatch.setattr(vllm_config(4, 1, 64).scheduler_config, "policy", "priority")
    with pytest.raises(UnsupportedError, match="--scheduling-policy priority decides"):
        start(options)


# ---- any order of events ---------------------------------------------------------------------


@pytest.mark.parametrize("machine", [AgentSessions, AgentSessionsAsync])
def test_any_order_of_events_gives_right_answers_and_loses_nothing(
    machine: type[AgentSessions],
) -> None:
    run = settings(
        max_examples=25,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
    )
    run_state_machine_as_test(machine, settings=run)
