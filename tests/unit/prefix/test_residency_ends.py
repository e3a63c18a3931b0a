# SPDX-License-Identifier: Apache-2.0
"""The residency store by example: edits, anonymous sessions, and giving blocks back."""

import numpy as np
import pytest
from fake_pool import HISTORY, FakeEngine, array, key, parallel

from vllm_stateful.prefix.residency import (
    ANONYMOUS,
    is_anonymous,
)
from vllm_stateful.schedule.retention import Worth
from vllm_stateful.types import Demotion, Outcome, SessionKey

ALICE, BOB = key("session-alice"), key("session-bob")
WORDS = list(range(500, 540))


def stranger(number: int) -> SessionKey:
    """A request that names no session."""
    return key(f"{ANONYMOUS}request-{number}")


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


# ---- edits -----------------------------------------------------------------------------------


def test_an_edit_of_the_second_half_supersedes_the_branch_it_rewrote(engine: FakeEngine) -> None:
    old = engine.kept(ALICE, HISTORY)
    young = engine.kept(BOB, WORDS)
    new = engine.kept(ALICE, [*HISTORY[:18], 1, 2, 3, 4, 5])
    assert old.superseded
    assert old.worth is Worth.SUPERSEDED
    assert (young.superseded, new.superseded) == (False, False)
    engine.store.demote_next(Demotion.PRESSURE)
    assert [r.alive for r in (old, young, new)] == [False, True, True]
    engine.check()


@pytest.mark.parametrize(("num_shared", "superseded"), [(16, False), (17, True), (33, True)])
def test_a_branch_is_superseded_when_at_least_half_of_it_was_kept(
    engine: FakeEngine, num_shared: int, superseded: bool
) -> None:
    history = list(range(34))
    old = engine.kept(ALICE, history)
    engine.kept(ALICE, [*history[:num_shared], *WORDS])
    assert old.superseded is superseded


def test_a_fork_under_another_name_supersedes_nothing(engine: FakeEngine) -> None:
    old = engine.kept(ALICE, HISTORY)
    engine.kept(BOB, [*HISTORY[:20], 1, 2])
    assert not old.superseded


def test_parallel_turns_from_one_frontier_supersede_nothing(engine: FakeEngine) -> None:
    engine.kept(ALICE, HISTORY)
    parallel(engine, ALICE, [1], [2])
    assert [b.superseded for b in engine.store.branches(ALICE)] == [False, False]


def test_a_repeated_turn_does_not_supersede_the_branch_that_covers_it(engine: FakeEngine) -> None:
    """A client that retries, and gets the same answer, has edited nothing."""
    made = engine.kept(ALICE, HISTORY)
    assert engine.turn(ALICE, HISTORY) is None
    assert made.alive
    assert not made.superseded


def test_a_repeated_turn_is_a_use_of_the_branch_that_covers_it(engine: FakeEngine) -> None:
    made = engine.kept(ALICE, HISTORY)
    engine.now = 100.0
    assert engine.turn(ALICE, HISTORY) is None
    engine.now = 150.0
    engine.store.expire(idle_s=100.0)
    assert made.alive


# ---- anonymous sessions ----------------------------------------------------------------------


def test_an_anonymous_turn_continues_the_anonymous_session_it_extends(engine: FakeEngine) -> None:
    first = engine.kept(stranger(1), HISTORY)
    turn = engine.start(stranger(2), [*HISTORY, 1])
    assert turn.match.outcome is Outcome.RESUMED
    assert turn.session == stranger(1)
    second = engine.finish(turn)
    assert second is not None
    assert (second.num_turns, second.session) == (2, stranger(1))
    assert engine.store.num_sessions == 1
    assert not first.alive


def test_an_anonymous_turn_that_leaves_the_history_is_another_session(engine: FakeEngine) -> None:
    engine.kept(stranger(1), HISTORY)
    turn = engine.start(stranger(2), [*HISTORY[:18], 1, 2])
    assert turn.match.outcome is Outcome.FORKED
    assert turn.session == stranger(2)


@pytest.mark.parametrize(
    ("first", "second"), [(ALICE, stranger(1)), (stranger(1), ALICE)], ids=["named", "anonymous"]
)
def test_named_and_anonymous_sessions_fork_from_each_other(
    engine: FakeEngine, first: SessionKey, second: SessionKey
) -> None:
    engine.kept(first, HISTORY)
    turn = engine.start(second, [*HISTORY, 1])
    assert (turn.match.outcome, turn.session) == (Outcome.FORKED, second)


def test_a_one_shot_goes_before_a_session_and_a_continued_one_does_not(engine: FakeEngine) -> None:
    engine.kept(stranger(1), HISTORY)
    engine.now = 60.0
    named = engine.kept(ALICE, WORDS)
    twice = engine.kept(stranger(2), [*HISTORY, 1])
    assert is_anonymous(twice.session)
    late = engine.kept(stranger(3), list(range(30)))
    engine.store.demote_next(Demotion.PRESSURE)
    assert [r.alive for r in (named, twice, late)] == [True, True, False]


def test_a_wait_for_a_tool_is_kept_longer_than_one_for_the_user(engine: FakeEngine) -> None:
    tool = engine.kept(ALICE, HISTORY, tool="read_file")
    user = engine.kept(BOB, WORDS)
    engine.store.demote_next(Demotion.PRESSURE)
    assert [r.alive for r in (tool, user)] == [True, False]


def test_a_tool_that_should_be_done_long_ago_is_not_waited_for(engine: FakeEngine) -> None:
    tool = engine.kept(ALICE, HISTORY, tool="read_file")
    engine.now = 7000.0
    user = engine.kept(BOB, WORDS)
    engine.store.demote_next(Demotion.PRESSURE)
    assert [r.alive for r in (tool, user)] == [False, True]


# ---- giving blocks back ----------------------------------------------------------------------


def test_demote_releases_tail_first_and_says_how_many_blocks_became_free(
    engine: FakeEngine,
) -> None:
    made = engine.kept(ALICE, HISTORY)
    assert engine.store.demote(made, Demotion.PRESSURE) == 6
    assert engine.pool.released == made.block_ids.tolist()[::-1]
    assert engine.store.demotions[Demotion.PRESSURE] == 1
    assert engine.pool.ref_cnts == {}


def test_demoting_one_of_two_holders_frees_only_what_nobody_else_holds(engine: FakeEngine) -> None:
    made = engine.kept(ALICE, HISTORY)
    engine.kept(BOB, [*HISTORY, 1])
    assert engine.store.demote(made, Demotion.PRESSURE) == 1
    engine.check()


def test_demote_next_spares_the_one_to_keep(engine: FakeEngine) -> None:
    made = engine.kept(ALICE, HISTORY)
    assert engine.store.demote_next(Demotion.PRESSURE, keep=made) is None
    assert made.alive
    assert engine.store.demote_next(Demotion.PRESSURE) == 6


def test_enforce_budget_demotes_the_least_recently_used_until_it_fits() -> None:
    engine = FakeEngine(budget=12)
    made = [engine.kept(f"session-{n}", [n, *HISTORY[1:]]) for n in range(3)]
    assert engine.store.pins.over_budget
    engine.store.enforce_budget()
    assert [r.alive for r in made] == [False, True, True]
    assert engine.store.pins.num_pinned == 12
    assert engine.store.demotions[Demotion.BUDGET] == 1
    engine.check()


def test_a_budget_of_zero_keeps_nothing() -> None:
    engine = FakeEngine(budget=0)
    engine.kept(ALICE, HISTORY)
    engine.store.enforce_budget()
    assert engine.store.num_sessions == 0
    assert engine.pool.ref_cnts == {}


def test_shared_blocks_count_once_against_the_budget() -> None:
    engine = FakeEngine(budget=8)
    engine.kept(ALICE, HISTORY)
    parallel(engine, ALICE, [1], [2], [3])
    engine.store.enforce_budget()
    assert len(engine.store.branches(ALICE)) == 3


def test_expire_demotes_what_was_not_used_for_that_long(engine: FakeEngine) -> None:
    old = engine.kept(ALICE, HISTORY)
    engine.now = 50.0
    young = engine.kept(BOB, WORDS)
    engine.now = 100.0
    engine.store.expire(idle_s=100.0)
    assert old.alive
    engine.now = 100.5
    engine.store.expire(idle_s=100.0)
    assert (old.alive, young.alive) == (False, True)
    assert engine.store.demotions[Demotion.IDLE] == 1
    engine.check()


def test_a_running_turn_does_not_expire_and_its_end_is_a_use(engine: FakeEngine) -> None:
    engine.kept(ALICE, HISTORY)
    turn = engine.start(ALICE, [*HISTORY, 1])
    engine.now = 1000.0
    engine.store.expire(idle_s=100.0)
    made = engine.finish(turn)
    engine.store.expire(idle_s=100.0)
    assert made is not None
    assert made.alive


def test_close_drops_all_idle_branches_of_that_session_only(engine: FakeEngine) -> None:
    engine.kept(ALICE, HISTORY)
    parallel(engine, ALICE, [1], [2])
    bob = engine.kept(BOB, WORDS)
    assert engine.store.close(ALICE) == 2
    assert engine.store.close(ALICE) == 0
    assert engine.store.residencies() == [bob]
    assert engine.store.demotions[Demotion.CLOSED] == 2
    engine.check()


def test_close_leaves_a_branch_that_a_turn_is_running_on(engine: FakeEngine) -> None:
    engine.kept(ALICE, HISTORY)
    turn = engine.start(ALICE, [*HISTORY, 1])
    assert engine.store.close(ALICE) == 0
    assert engine.finish(turn) is not None
    engine.check()


def test_reset_drops_everything_and_running_turns_keep_their_blocks(engine: FakeEngine) -> None:
    engine.kept(ALICE, HISTORY)
    engine.kept(BOB, WORDS)
    turn = engine.start(ALICE, [*HISTORY, 1])
    engine.store.drop_all()
    assert engine.store.num_sessions == engine.store.num_residencies == engine.store.num_idle == 0
    assert engine.store.demotions[Demotion.RESET] == 2
    engine.check()
    engine.preempt(turn)
    assert engine.pool.ref_cnts == {}
    assert engine.store.demotions[Demotion.PREEMPTED] == 0


def test_a_turn_that_ends_after_a_reset_can_still_be_kept(engine: FakeEngine) -> None:
    engine.kept(ALICE, HISTORY)
    turn = engine.start(ALICE, [*HISTORY, 1])
    engine.store.drop_all()
    made = engine.finish(turn)
    assert engine.store.residencies() == [made]
    engine.check()


def test_every_demotion_is_listed_from_the_start(engine: FakeEngine) -> None:
    assert engine.store.demotions == dict.fromkeys(Demotion, 0)


def test_tokens_of_a_residency_are_those_of_its_turn(engine: FakeEngine) -> None:
    made = engine.turn(ALICE, HISTORY, [1, 2, 3])
    assert made is not None
    assert np.array_equal(made.tokens, array([*HISTORY, 1, 2, 3]))
    assert made.frontier == 25


def test_a_superseded_branch_whose_turn_is_repeated_is_live_again(engine: FakeEngine) -> None:
    first = engine.kept(ALICE, [*HISTORY, *range(300, 310)])
    engine.kept(ALICE, [*HISTORY, *range(400, 410)])
    assert first.superseded
    assert engine.turn(ALICE, [*HISTORY, *range(300, 310)]) is None
    assert not first.superseded


def test_a_turn_continues_the_idle_branch_that_it_extends_not_a_shorter_busy_one(
    engine: FakeEngine,
) -> None:
    engine.kept(ALICE, HISTORY)
    engine.start(ALICE, [*HISTORY, 1])
    longer = engine.finish(engine.start(ALICE, [*HISTORY, 7]))
    match = engine.store.match(ALICE, array([*HISTORY, 7, 8, 9]), len(HISTORY) + 2)
    assert match.residency is longer
    assert longer is not None
    assert match.num_tokens == longer.frontier
