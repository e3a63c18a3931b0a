# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler with sessions, step by step: what is computed, copied, kept and given back."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from simulated_engine import SimulatedEngine, expected_answer, vllm_config
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope
from vllm.v1.request import RequestStatus

from vllm_stateful.adapters.invariants import check_pool
from vllm_stateful.adapters.turn import CLOSE_ACTION
from vllm_stateful.types import Bypass, Demotion, Identity, Outcome, SessionKey

HISTORY = list(range(22))
"""22 tokens: with one answer token, 22 computed ones in five full blocks and one half full."""

ALICE, BOB = "session-alice", "session-bob"


class Engine(SimulatedEngine):
    """A simulated engine that records its steps and runs on a clock of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.now = 0.0
        self.manager.store._clock = lambda: self.now
        self.store = self.manager.store
        self.counts = self.manager.turn_counts
        self.outputs: list[SchedulerOutput] = []
        schedule = self.scheduler.schedule

        def recorded(*args: Any, **kwargs: Any) -> SchedulerOutput:
            output = schedule(*args, **kwargs)
            self.outputs.append(output)
            return output

        self.scheduler.schedule = recorded

    def turn(
        self, request_id: str, prompt: list[int], session_id: str | None = ALICE, **options: Any
    ) -> list[int]:
        """One turn to its end. Returns the whole history after it."""
        options.setdefault("max_tokens", 1)
        self.outputs.clear()
        self.add(request_id, prompt, session_id=session_id, **options)
        self.run()
        answer = self.answer(request_id)
        assert answer == expected_answer(prompt, options["max_tokens"])
        return prompt + answer

    def num_scheduled(self, request_id: str) -> int:
        return sum(output.num_scheduled_tokens.get(request_id, 0) for output in self.outputs)

    @property
    def num_copies(self) -> int:
        return sum(len(output.kv_cache_block_copies or ()) for output in self.outputs)

    def branches(self, session_id: str) -> tuple[Any, ...]:
        return tuple(self.store.branches(SessionKey(Identity(), session_id)))

    def demotions(self) -> dict[str, int]:
        return {str(why): n for why, n in self.store.demotions.items() if n}

    def outcomes(self) -> dict[str, int]:
        return {str(outcome): n for outcome, n in self.counts.outcomes.items()}

    def check_nothing_is_lost(self) -> None:
        for residency in self.store.residencies():
            self.manager.store.close(residency.session)
        counts = check_pool(self.scheduler)
        assert counts["free"] == counts["total"]
        assert not self.manager.turns
        assert not self.manager.bypassed


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"num_blocks": 41, "async_scheduling": request.param}


@pytest.fixture
def engine(options: dict[str, Any]) -> Iterator[Engine]:
    engine = Engine(**options)
    yield engine
    engine.run()
    engine.check_nothing_is_lost()


# ---- resume ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_history", [3, 15, 16, 17, 21, 22, 23])
@pytest.mark.parametrize("num_new", [1, 2, 3, 4, 5, 9])
def test_a_resumed_turn_computes_its_new_tokens_and_the_last_answer_token(
    engine: Engine, num_history: int, num_new: int
) -> None:
    history = engine.turn("first", HISTORY[:num_history])
    engine.turn("second", history + [7] * num_new)
    assert engine.num_scheduled("second") == num_new + 1
    assert engine.outcomes() == {"cold": 1, "resumed": 1}


def test_a_resumed_turn_reports_what_it_reused(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    stats = engine.add("second", [*history, 1, 2, 3], session_id=ALICE).prefill_stats
    engine.run()
    assert stats is not None
    assert stats.num_cached_tokens == 22
    assert stats.num_computed_tokens == 4
    assert engine.counts.num_tokens_reused == 22
    assert engine.counts.num_tokens_computed == 22 + 4


def test_the_partly_filled_block_is_continued_in_place_without_a_copy(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    (before,) = engine.branches(ALICE)
    ids = before.block_ids.tolist()
    engine.turn("second", [*history, 1, 2, 3])
    (after,) = engine.branches(ALICE)
    assert after.block_ids.tolist()[: len(ids)] == ids
    assert engine.num_copies == 0
    assert after.frontier == 26
    assert len(after.blocks) == 7


@pytest.mark.parametrize("num_turns", [12])
def test_many_turns_compute_each_token_once(engine: Engine, num_turns: int) -> None:
    history = HISTORY
    for number in range(num_turns):
        history = engine.turn(f"turn-{number}", [*history, number], max_tokens=2)
        assert engine.num_scheduled(f"turn-{number}") == (24 if number == 0 else 3)
    assert len(engine.branches(ALICE)) == 1
    assert engine.outcomes() == {"cold": 1, "resumed": num_turns - 1}


def test_an_edit_costs_from_the_first_differing_token_on(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    edited = [*history[:18], 99, *history[19:]]
    engine.turn("second", edited)
    assert engine.num_scheduled("second") == len(edited) - 18
    assert engine.num_copies == 1
    assert engine.outcomes() == {"cold": 1, "diverged": 1}


def test_an_edit_at_a_block_boundary_copies_nothing(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    engine.turn("second", [*history[:20], 99, 98])
    assert engine.num_scheduled("second") == 2
    assert engine.num_copies == 0


def test_a_tenant_never_gets_the_blocks_of_another(engine: Engine) -> None:
    history = engine.turn("first", HISTORY, cache_salt="tenant-a")
    for number, salt in enumerate((None, "tenant-b")):
        engine.turn(f"other-{number}", [*history, 1], cache_salt=salt)
        assert engine.num_scheduled(f"other-{number}") == len(history) + 1
    assert engine.outcomes() == {"cold": 3}


def test_sessions_without_an_id_continue_each_other(engine: Engine) -> None:
    history = engine.turn("first", HISTORY, None)
    engine.turn("second", [*history, 1], None)
    assert engine.num_scheduled("second") == 2
    assert engine.outcomes() == {"cold": 1, "resumed": 1}
    assert engine.store.num_sessions == 1


# ---- parallel turns and forks ----------------------------------------------------------------


def test_of_two_parallel_turns_the_second_copies_exactly_one_block(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    engine.outputs.clear()
    prompts = {"a": [*history, 1, 2], "b": [*history, 3, 4]}
    for request_id, prompt in prompts.items():
        engine.add(request_id, prompt, session_id=ALICE, max_tokens=3)
    engine.run()
    for request_id, prompt in prompts.items():
        assert engine.answer(request_id) == expected_answer(prompt, 3)
        assert engine.num_scheduled(request_id) == 3 + 2
    assert engine.num_copies == 1
    assert len(engine.branches(ALICE)) == 2
    a, b = (branch.block_ids.tolist() for branch in engine.branches(ALICE))
    assert a[:5] == b[:5]
    assert a[5] != b[5]


def test_a_fork_computes_only_its_own_tokens(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    engine.turn("fork", [*history, 1], BOB)
    assert engine.num_scheduled("fork") == 2
    assert engine.outcomes() == {"cold": 1, "forked": 1}


def test_a_fork_at_the_frontier_leaves_the_residency_with_its_own_session(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    other_token = (history[-1] + 1) % 100
    engine.turn("fork", [*HISTORY, other_token], BOB)
    assert engine.num_copies == 1
    assert len(engine.branches(ALICE)) == len(engine.branches(BOB)) == 1
    engine.turn("second", [*history, 2])
    assert engine.num_copies == 0
    assert engine.outcomes() == {"cold": 1, "forked": 1, "resumed": 1}


def test_a_fork_that_computed_its_parents_last_token_does_not_lure_the_parent_away(
    engine: Engine,
) -> None:
    history = engine.turn("first", HISTORY)
    engine.turn("fork", [*history, 1], BOB)
    engine.turn("second", [*history, 2])
    assert engine.num_copies == 0
    assert engine.outcomes() == {"cold": 1, "forked": 1, "resumed": 1}


def test_a_fork_that_ends_for_good_does_not_take_the_parents_session_along(
    engine: Engine,
) -> None:
    history = engine.turn("first", HISTORY)
    forked = engine.add("fork", [*history, 1], session_id=BOB, max_tokens=1)
    forked.kv_hints = closing_hint()
    engine.run()
    assert len(engine.branches(BOB)) == 0
    assert len(engine.branches(ALICE)) == 1


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


# ---- ends of turns ---------------------------------------------------------------------------


def test_an_abort_while_running_keeps_what_was_computed_and_the_next_turn_resumes(
    engine: Engine,
) -> None:
    engine.add("first", HISTORY, session_id=ALICE, max_tokens=50)
    for _ in range(6):
        engine.step()
    engine.abort("first")
    said = engine.answer("first")
    engine.run()
    (kept,) = engine.branches(ALICE)
    assert kept.frontier >= 22
    assert kept.tokens.tolist() == [*HISTORY, *said][: kept.frontier]
    prompt = [*HISTORY, *said, 1]
    engine.turn("second", prompt)
    assert engine.num_scheduled("second") == len(prompt) - kept.frontier <= 3
    assert engine.outcomes() == {"cold": 1, "resumed": 1}


def test_an_abort_in_the_middle_of_the_prompt_keeps_the_part_that_is_computed(
    engine: Engine,
) -> None:
    prompt = [n % 100 for n in range(150)]
    engine.add("first", prompt, session_id=ALICE)
    engine.step()
    engine.abort("first")
    engine.run()
    (kept,) = engine.branches(ALICE)
    assert kept.tokens.tolist() == prompt[: kept.frontier]
    engine.turn("second", prompt)
    assert engine.num_scheduled("second") == 150 - kept.frontier


def test_an_abort_of_a_turn_that_never_ran_keeps_nothing_and_spares_the_session(
    engine: Engine,
) -> None:
    history = engine.turn("first", HISTORY)
    engine.add("second", [*history, 1], session_id=ALICE)
    engine.abort("second")
    engine.run()
    assert len(engine.branches(ALICE)) == 1
    engine.turn("third", [*history, 2])
    assert engine.num_scheduled("third") == 2


def test_a_turn_that_ended_in_an_error_is_not_kept(engine: Engine) -> None:
    engine.add("first", HISTORY, session_id=ALICE, max_tokens=50)
    for _ in range(4):
        engine.step()
    engine.scheduler.finish_requests("first", RequestStatus.FINISHED_ERROR)
    engine.run()
    assert engine.store.num_sessions == 0


@pytest.mark.parametrize("running_too", [False, True], ids=["keep-running", "restart-running"])
def test_after_a_reset_only_what_was_computed_since_is_kept(
    engine: Engine, running_too: bool
) -> None:
    """A turn that goes on over old KV keeps nothing; one that starts again may be kept."""
    engine.turn("idle", [60, *HISTORY], BOB)
    engine.add("running", HISTORY, session_id=ALICE, max_tokens=8)
    for _ in range(3):
        engine.step()
    while running_too and engine.in_flight:
        engine.scheduler.update_from_output(*engine.in_flight.popleft())
    engine.scheduler.reset_prefix_cache(reset_running_requests=running_too)
    assert engine.store.num_sessions == 0
    assert engine.demotions() == {"reset": 1}
    engine.run()
    assert engine.answer("running") == expected_answer(HISTORY, 8)
    assert len(engine.branches(ALICE)) == int(running_too)
    assert engine.store.num_sessions == int(running_too)


def test_a_reset_under_a_turn_that_borrowed_leaves_it_running_and_drops_its_session(
    engine: Engine,
) -> None:
    history = engine.turn("first", HISTORY)
    engine.add("second", [*history, 1], session_id=ALICE, max_tokens=8)
    for _ in range(3):
        engine.step()
    engine.scheduler.reset_prefix_cache()
    engine.run()
    assert engine.answer("second") == expected_answer([*history, 1], 8)
    assert engine.store.num_sessions == 0
    engine.turn("third", [*HISTORY, 55])
    assert engine.store.num_sessions == 1


def closing_hint() -> KvHintsEnvelope:
    return KvHintsEnvelope("test", "hint", [KvHintAction("0", CLOSE_ACTION, "1", {})])


def test_the_last_turn_of_a_session_keeps_nothing(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    engine.outputs.clear()
    last = engine.add("last", [*history, 1], session_id=ALICE, max_tokens=2)
    last.kv_hints = closing_hint()
    engine.run()
    assert engine.answer("last") == expected_answer([*history, 1], 2)
    assert engine.num_scheduled("last") == 3
    assert engine.store.num_sessions == 0
    assert engine.store.pins.num_pinned == 0


def test_the_end_of_a_session_is_counted_as_closed_not_as_preempted(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    engine.add("last", [*history, 1], session_id=ALICE).kv_hints = closing_hint()
    engine.run()
    assert engine.demotions() == {"closed": 1}


def test_a_session_that_is_closed_starts_cold_under_new_blocks(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    close = {"session_id": ALICE, "cache_salt": None}
    assert engine.scheduler.stateful("close", close) == {"closed": 1}
    assert engine.scheduler.stateful("close", close) == {"closed": 0}
    assert engine.demotions() == {"closed": 1}
    engine.turn("second", [*history, 1])
    assert engine.outcomes() == {"cold": 2}


def test_a_session_that_is_closed_while_its_turn_runs_keeps_nothing_after_it(
    engine: Engine,
) -> None:
    history = engine.turn("first", HISTORY)
    engine.add("second", [*history, 1], session_id=ALICE, max_tokens=8)
    for _ in range(3):
        engine.step()
    close = {"session_id": ALICE, "cache_salt": None}
    assert engine.scheduler.stateful("close", close) == {"closed": 1}
    engine.run()
    assert engine.answer("second") == expected_answer([*history, 1], 8)
    assert engine.store.num_sessions == 0
    assert engine.demotions() == {"closed": 1}
    engine.turn("third", [*history, 2])
    assert len(engine.branches(ALICE)) == 1


def test_the_last_turn_of_a_session_ends_its_parallel_branches_too(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    engine.add("a", [*history, 1], session_id=ALICE, max_tokens=2)
    engine.add("b", [*history, 2], session_id=ALICE, max_tokens=6).kv_hints = closing_hint()
    engine.run()
    assert engine.store.num_sessions == 0


def test_a_close_under_another_salt_closes_nothing(engine: Engine) -> None:
    engine.turn("first", HISTORY, cache_salt="tenant-a")
    for salt in (None, "tenant-b"):
        arguments = {"session_id": ALICE, "cache_salt": salt}
        assert engine.scheduler.stateful("close", arguments) == {"closed": 0}


def test_an_idle_session_gives_its_blocks_back_with_the_next_step(engine: Engine) -> None:
    engine.turn("first", HISTORY)
    engine.now = 899.0
    engine.turn("other", [50, *HISTORY], BOB)
    assert len(engine.branches(ALICE)) == 1
    engine.now = 901.0
    engine.turn("another", [51, *HISTORY], "session-carol")
    assert engine.branches(ALICE) == ()
    assert len(engine.branches(BOB)) == 1
    assert engine.demotions() == {"idle": 1}


def test_a_long_turn_does_not_expire_while_it_runs(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    engine.add("second", [*history, 1], session_id=ALICE, max_tokens=10)
    engine.step()
    engine.now = 5000.0
    engine.run()
    assert len(engine.branches(ALICE)) == 1
    assert engine.demotions() == {}


# ---- requests that stay stock ----------------------------------------------------------------


def test_prompt_logprobs_are_bypassed_counted_once_and_leave_the_session_alone(
    engine: Engine,
) -> None:
    history = engine.turn("first", HISTORY)
    engine.turn("scored", [*history, 1], prompt_logprobs=1)
    assert engine.num_scheduled("scored") == len(history) + 1
    assert engine.outcomes() == {"cold": 1, "bypassed": 1}
    assert dict(engine.counts.bypasses) == {Bypass.PROMPT_LOGPROBS: 1}
    engine.turn("second", [*history, 2])
    assert engine.num_scheduled("second") == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"resumable": True}, Bypass.STREAMING_INPUT),
        ({"mm_features": [object()]}, Bypass.MULTIMODAL),
        ({"prompt_embeds": object()}, Bypass.PROMPT_EMBEDS),
        ({"prompt_token_ids": None}, Bypass.PROMPT_EMBEDS),
        ({"pooling_params": object()}, Bypass.POOLING),
        ({"skip_reading_prefix_cache": True}, Bypass.PROMPT_LOGPROBS),
        ({}, None),
    ],
    ids=str,
)
def test_reasons_to_leave_a_request_to_stock_vllm(
    change: dict[str, Any], reason: Bypass | None
) -> None:
    from vllm_stateful.adapters.turn import bypass_reason

    ordinary = {
        "pooling_params": None,
        "resumable": False,
        "mm_features": [],
        "prompt_embeds": None,
        "prompt_token_ids": [1],
        "skip_reading_prefix_cache": False,
    }
    request: Any = SimpleNamespace(**{**ordinary, **change})
    assert bypass_reason(request, caching=True) == reason
    assert bypass_reason(request, caching=False) == Bypass.PREFIX_CACHING_OFF


def test_an_unknown_operation_is_an_error_that_names_it(engine: Engine) -> None:
    with pytest.raises(ValueError, match="'list'"):
        engine.scheduler.stateful("list", {})


# ---- many sessions ---------------------------------------------------------------------------


def test_two_hundred_sessions_in_a_pool_for_twenty_are_all_answered_and_none_is_lost(
    options: dict[str, Any],
) -> None:
    engine = Engine(**{**options, "num_blocks": 121})
    histories: dict[int, list[int]] = {}
    for turn in range(2):
        for first in range(0, 200, 20):
            prompts = {
                n: [*histories.get(n, [n % 100, n // 100, *HISTORY[:18]]), turn]
                for n in range(first, first + 20)
            }
            for number, prompt in prompts.items():
                name = f"session-{number:04}"
                engine.add(f"{name}/{turn}", prompt, session_id=name, max_tokens=2)
            engine.run()
            for number, prompt in prompts.items():
                answer = engine.answer(f"session-{number:04}/{turn}")
                assert answer == expected_answer(prompt, 2)
                histories[number] = prompt + answer
            check_pool(engine.scheduler)
    assert sum(engine.outcomes().values()) == 400
    assert 1 <= engine.store.num_sessions <= 20
    assert engine.store.demotions[Demotion.BUDGET] > 300
    engine.check_nothing_is_lost()


def test_a_turn_for_each_outcome_is_counted_once_whatever_happens_to_it(engine: Engine) -> None:
    for number in range(6):
        engine.add(str(number), [number, *HISTORY], session_id=f"session-{number}", max_tokens=12)
    engine.run()
    assert sum(engine.outcomes().values()) == 6
    assert engine.outcomes() == {str(Outcome.COLD): 6}
