# SPDX-License-Identifier: Apache-2.0
"""A pool that is too small: who waits, who is preempted, who gives its blocks back."""

from typing import Any

import pytest
from recorded_engine import ALICE, BOB, HISTORY, Engine
from simulated_engine import expected_answer, vllm_config

from vllm_stateful.types import Demotion

# ---- a pool that is too small ----------------------------------------------------------------


def test_preemption_in_a_small_pool_gives_right_answers(options: dict[str, Any]) -> None:
    engine = Engine(**{**options, "num_blocks": 18})
    prompts = {str(n): [n, *HISTORY[:13]] for n in range(4)}
    for request_id, prompt in prompts.items():
        engine.add(request_id, prompt, session_id=f"session-{request_id}", max_tokens=24)
    engine.run()
    for request_id, prompt in prompts.items():
        assert engine.answer(request_id) == expected_answer(prompt, 24)
    assert sum(request.num_preemptions for request in engine.finished.values()) > 0
    engine.check_nothing_is_lost()


def test_a_preempted_turn_forfeits_what_it_borrowed_and_still_answers_right(
    options: dict[str, Any],
) -> None:
    engine = Engine(**{**options, "num_blocks": 18})
    history = {n: engine.turn(f"first-{n}", [n, *HISTORY[:9]], f"session-{n}") for n in range(2)}
    prompts = {str(n): [*history[n], 50 + n] for n in range(2)}
    for request_id, prompt in prompts.items():
        engine.add(request_id, prompt, session_id=f"session-{request_id}", max_tokens=30)
    engine.run()
    for request_id, prompt in prompts.items():
        assert engine.answer(request_id) == expected_answer(prompt, 30)
    assert sum(request.num_preemptions for request in engine.finished.values()) > 0
    assert engine.store.demotions[Demotion.PREEMPTED] > 0
    assert engine.outcomes() == {"cold": 2, "resumed": 2}
    engine.check_nothing_is_lost()


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_under_priority_scheduling_an_urgent_turn_overtakes_those_that_wait(
    options: dict[str, Any], policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_config(4, 2, 64).scheduler_config, "policy", policy)
    engine = Engine(**options, max_num_seqs=2)
    history = engine.turn("first", HISTORY)
    lengths = {"slow-0": 4, "slow-1": 20, "slow-2": 4, "urgent": 4}
    for position, (request_id, max_tokens) in enumerate(lengths.items()):
        engine.add(
            request_id,
            [*history, position],
            session_id=ALICE,
            max_tokens=max_tokens,
            priority=0 if request_id == "urgent" else 5,
            arrival_time=float(position),
        )
    engine.outputs.clear()
    engine.run()
    for position, (request_id, max_tokens) in enumerate(lengths.items()):
        assert engine.answer(request_id) == expected_answer([*history, position], max_tokens)
    admitted = list(dict.fromkeys(r for o in engine.outputs for r in o.num_scheduled_tokens))
    expected = ["slow-0", "slow-1", "slow-2"]
    expected.insert(0 if policy == "priority" else 3, "urgent")
    assert admitted == expected
    engine.check_nothing_is_lost()


@pytest.mark.parametrize(("policy", "preempted"), [("fcfs", "urgent"), ("priority", "slow")])
def test_under_priority_scheduling_the_less_urgent_turn_is_preempted(
    options: dict[str, Any], policy: str, preempted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_config(4, 8, 64).scheduler_config, "policy", policy)
    engine = Engine(**{**options, "num_blocks": 18})
    prompts = {"slow": [1, *HISTORY[:13]], "urgent": [2, *HISTORY[:13]]}
    for position, (request_id, prompt) in enumerate(prompts.items()):
        engine.add(
            request_id,
            prompt,
            session_id=f"session-{request_id}",
            max_tokens=30,
            priority=0 if request_id == "urgent" else 5,
            arrival_time=float(position),
        )
    engine.run()
    for request_id, prompt in prompts.items():
        assert engine.answer(request_id) == expected_answer(prompt, 30)
    assert [r for r in prompts if engine.finished[r].num_preemptions] == [preempted]
    engine.check_nothing_is_lost()


def test_a_turn_that_needs_the_whole_pool_demotes_everything_and_runs(
    options: dict[str, Any],
) -> None:
    engine = Engine(**options)
    for number in range(3):
        engine.turn(f"small-{number}", [number, *HISTORY], f"session-{number}")
    assert engine.store.pins.num_pinned > 0
    prompt = [n % 100 for n in range(155)]
    engine.turn("big", prompt, "session-big", max_tokens=5)
    assert engine.demotions() == {"pressure": 3, "budget": 1}
    engine.check_nothing_is_lost()


def test_a_prompt_that_exactly_fills_the_pool_runs_although_a_session_is_pinned(
    engine: Engine,
) -> None:
    engine.turn("small", HISTORY)
    engine.turn("exact", [(7 * n) % 100 for n in range(160)], BOB)
    assert engine.outcomes() == {"cold": 2}


def test_a_resumed_turn_that_exactly_fills_the_pool_keeps_its_own_base(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_PIN_FRACTION", "1")
    engine = Engine(**options)
    other = engine.turn("other", [50, *HISTORY], BOB)
    history = engine.turn("first", HISTORY)
    engine.turn("second", [*history, *[5] * (160 - len(history))])
    assert engine.num_scheduled("second") == 160 - 22
    assert engine.branches(BOB) == ()
    engine.turn("other-again", [*other, 1], BOB)
    engine.check_nothing_is_lost()


def test_an_edit_that_needs_the_whole_pool_gives_up_its_base_and_runs(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharing would keep the old branch's last block: one more than the pool has."""
    monkeypatch.setenv("VLLM_STATEFUL_PIN_FRACTION", "1")
    engine = Engine(**options)
    history = engine.turn("first", HISTORY)
    engine.turn("second", [*history[:18], *[99] * (160 - 18)])
    engine.check_nothing_is_lost()


def test_a_turn_that_grows_while_it_decodes_takes_blocks_from_idle_sessions(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_PIN_FRACTION", "1")
    engine = Engine(**options)
    for number in range(6):
        engine.turn(f"small-{number}", [number, *HISTORY], f"session-{number}")
    request = engine.add("long", [77, *HISTORY], session_id=ALICE, max_tokens=100)
    engine.run()
    assert engine.answer("long") == expected_answer([77, *HISTORY], 100)
    assert request.num_preemptions == 0
    assert engine.store.demotions[Demotion.PRESSURE] >= 4
    engine.check_nothing_is_lost()


@pytest.mark.parametrize("fraction", ["0", "0.3", "1"])
def test_pinned_blocks_stay_within_their_budget(
    options: dict[str, Any], fraction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_PIN_FRACTION", fraction)
    engine = Engine(**options)
    for number in range(10):
        engine.turn(f"turn-{number}", [number, *HISTORY], f"session-{number}")
        assert engine.store.pins.num_pinned <= int(float(fraction) * 40)
    assert engine.store.num_sessions == int(float(fraction) * 40) // 6
    engine.check_nothing_is_lost()


def test_a_turn_larger_than_the_whole_budget_does_not_cost_the_others_their_kv(
    options: dict[str, Any],
) -> None:
    engine = Engine(**options)
    engine.turn("small-0", [0, *HISTORY], ALICE)
    engine.turn("small-1", [1, *HISTORY], BOB)
    engine.turn("big", [(7 * n) % 100 for n in range(90)], "session-big")
    assert engine.demotions() == {"budget": 1}
    assert (len(engine.branches(ALICE)), len(engine.branches(BOB))) == (1, 1)
    engine.check_nothing_is_lost()


def test_a_turn_that_can_never_fit_costs_no_session_its_kv(options: dict[str, Any]) -> None:
    """Somebody else's running turn holds the blocks: giving up sessions would not help."""
    engine = Engine(**options)
    engine.turn("small", HISTORY)
    engine.add("running", [50, *HISTORY], session_id=BOB, max_tokens=40)
    engine.step()
    engine.add("big", [(7 * n) % 100 for n in range(150)], session_id="session-big")
    for _ in range(5):
        engine.step()
    assert engine.demotions() == {}
    assert len(engine.branches(ALICE)) == 1
    engine.run()
    engine.check_nothing_is_lost()


def test_idle_sessions_do_not_count_as_usage(engine: Engine) -> None:
    assert engine.manager.usage == 0
    engine.turn("first", HISTORY)
    assert engine.store.pins.num_pinned == 6
    assert engine.manager.usage == 0


def test_sessions_are_spared_when_giving_them_up_would_not_make_room(
    options: dict[str, Any],
) -> None:
    """A running fork holds its parent's blocks: the parent's residency is no reserve."""
    engine = Engine(**{**options, "num_blocks": 101}, max_batched=512)
    engine.store.pins.budget_blocks = 100
    for n in range(4):
        engine.turn(f"small-{n}", [n, *HISTORY[:17]], f"session-{n}", max_tokens=2)
    parent = [n * 7 % 100 for n in range(160)]
    engine.turn("parent", parent, "session-parent", max_tokens=2)
    engine.add("fork", [*parent, 5, 6, 7], session_id="session-child", max_tokens=40)
    engine.step()
    engine.step()
    assert engine.manager.usage >= 0.4
    engine.add("big", [n * 13 % 100 for n in range(290)], session_id="session-big")
    engine.step()
    engine.step()
    assert engine.demotions() == {}
    engine.run()
    assert engine.answer("big") == expected_answer([n * 13 % 100 for n in range(290)], 4)
    engine.check_nothing_is_lost()
