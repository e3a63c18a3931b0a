# SPDX-License-Identifier: Apache-2.0
"""The residency store by example: who continues what, what is kept, who goes first."""

import pytest
from fake_pool import BLOCK_SIZE, HISTORY, FakeEngine, array, key, parallel

from vllm_stateful.prefix.groups import Table
from vllm_stateful.prefix.matching import MIN_SHARED_TOKENS
from vllm_stateful.prefix.residency import ANONYMOUS, FinishedTurn
from vllm_stateful.prefix.residency_store import MAX_BRANCHES
from vllm_stateful.types import Demotion, Identity, Outcome, SessionKey

ALICE, BOB = key("session-alice"), key("session-bob")
WORDS = list(range(500, 540))


def stranger(number: int) -> SessionKey:
    """A request that names no session."""
    return key(f"{ANONYMOUS}request-{number}")


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


# ---- looking ---------------------------------------------------------------------------------


def test_an_empty_store_is_cold(engine: FakeEngine) -> None:
    match = engine.store.match(ALICE, array(HISTORY), 21)
    assert match[:4] == (ALICE, Outcome.COLD, None, 0)


@pytest.mark.parametrize(
    ("session", "prompt", "outcome", "num_tokens"),
    [
        (ALICE, [*HISTORY, 1, 2], Outcome.RESUMED, 22),
        (ALICE, HISTORY, Outcome.RESUMED, 21),
        (ALICE, HISTORY[:18], Outcome.RESUMED, 17),
        (ALICE, [*HISTORY[:19], 1, 2, 3, 4], Outcome.DIVERGED, 19),
        (BOB, [*HISTORY, 1, 2], Outcome.FORKED, 22),
        (BOB, [*HISTORY[:19], 1, 2, 3, 4], Outcome.FORKED, 19),
        (BOB, [1, *HISTORY], Outcome.COLD, 0),
        (ALICE, [1, *HISTORY], Outcome.COLD, 0),
        (ALICE, [HISTORY[0]], Outcome.COLD, 0),
    ],
)
def test_outcome_and_tokens_of_a_match(
    engine: FakeEngine,
    session: SessionKey,
    prompt: list[int],
    outcome: Outcome,
    num_tokens: int,
) -> None:
    engine.kept(ALICE, HISTORY)
    match = engine.store.match(session, array(prompt), len(prompt) - 1)
    assert (match.session, match.outcome, match.num_tokens) == (session, outcome, num_tokens)
    assert (match.residency is None) == (outcome is Outcome.COLD)


@pytest.mark.parametrize(
    ("num_shared", "outcome"),
    [(MIN_SHARED_TOKENS - 1, Outcome.COLD), (MIN_SHARED_TOKENS, Outcome.FORKED)],
)
def test_a_shared_opening_shorter_than_the_minimum_is_no_fork(
    engine: FakeEngine, num_shared: int, outcome: Outcome
) -> None:
    engine.kept(ALICE, HISTORY)
    prompt = [*HISTORY[:num_shared], *WORDS]
    assert engine.store.match(BOB, array(prompt), len(prompt) - 1).outcome is outcome


def test_a_whole_residency_shorter_than_the_minimum_is_resumed(engine: FakeEngine) -> None:
    engine.kept(ALICE, HISTORY[:5])
    match = engine.store.match(ALICE, array([*HISTORY[:5], 1]), 5)
    assert (match.outcome, match.num_tokens) == (Outcome.RESUMED, 5)


def test_match_changes_nothing(engine: FakeEngine) -> None:
    made = engine.kept(ALICE, HISTORY)
    before = engine.pool.ref_cnts
    for session in (ALICE, BOB, stranger(1)):
        engine.store.match(session, array([*HISTORY, 1]), 22)
    assert engine.pool.ref_cnts == before
    assert engine.store.residencies() == [made]
    assert made.is_idle


OTHER_IDENTITIES = [
    Identity("tenant-b"),
    Identity("tenant-a", ("adapter", 1, "folder")),
    Identity("tenant-a", ("adapter", 2, "folder")),
    Identity("tenant-a", ("adapter", 1, "elsewhere")),
    Identity(),
    Identity(""),
]


@pytest.mark.parametrize("identity", OTHER_IDENTITIES)
@pytest.mark.parametrize("session_id", ["session-alice", f"{ANONYMOUS}1"])
def test_another_identity_never_matches(
    engine: FakeEngine, identity: Identity, session_id: str
) -> None:
    engine.kept(SessionKey(Identity("tenant-a"), session_id), HISTORY)
    asking = SessionKey(identity, session_id)
    match = engine.store.match(asking, array([*HISTORY, 1]), 22)
    assert match[:4] == (asking, Outcome.COLD, None, 0)


def test_one_session_id_under_two_identities_is_two_sessions(engine: FakeEngine) -> None:
    engine.kept(key("session-one", "a"), HISTORY)
    engine.kept(key("session-one", "b"), HISTORY)
    assert engine.store.num_sessions == 2
    assert engine.store.close(key("session-one", "a")) == 1
    assert engine.store.num_sessions == 1


# ---- one turn after the other ----------------------------------------------------------------


def test_a_resumed_turn_appends_to_the_same_blocks_and_replaces_its_residency(
    engine: FakeEngine,
) -> None:
    first = engine.kept(ALICE, HISTORY)
    ids = first.block_ids.tolist()
    second = engine.kept(ALICE, [*HISTORY, 1, 2, 3])
    assert second.block_ids.tolist()[: len(ids)] == ids
    assert second.num_turns == 2
    assert not first.alive
    assert engine.store.residencies() == [second]
    engine.check()


def test_a_borrowed_residency_is_not_pinned_and_not_idle_but_still_found(
    engine: FakeEngine,
) -> None:
    made = engine.kept(ALICE, HISTORY)
    engine.start(ALICE, [*HISTORY, 1])
    assert engine.store.pins.num_pinned == 0
    assert not made.is_idle
    assert engine.store.demote_next(Demotion.PRESSURE) is None
    assert engine.store.match(BOB, array([*HISTORY, 2]), 22).residency is made
    engine.check()


def test_a_borrowed_residency_cannot_be_borrowed_twice(engine: FakeEngine) -> None:
    made = engine.kept(ALICE, HISTORY)
    engine.store.borrow(made, "request-a")
    with pytest.raises(AssertionError):
        engine.store.borrow(made, "request-b")


def test_giving_back_restores_pins_and_moves_to_the_back_of_the_queue(engine: FakeEngine) -> None:
    made = engine.kept(ALICE, HISTORY)
    other = engine.kept(BOB, WORDS)
    engine.store.borrow(made, "request-a")
    engine.store.undo_borrow(made)
    assert made.is_idle
    engine.check()
    engine.store.demote_next(Demotion.PRESSURE)
    assert not other.alive
    assert made.alive


@pytest.mark.parametrize("why", [Demotion.PREEMPTED, Demotion.CLOSED, Demotion.RESET])
def test_a_forfeited_residency_is_forgotten_and_its_blocks_stay_with_the_turn(
    engine: FakeEngine, why: Demotion
) -> None:
    engine.kept(ALICE, HISTORY)
    turn = engine.start(ALICE, [*HISTORY, 1])
    assert turn.borrowed is not None
    engine.store.forfeit(turn.borrowed, why)
    assert engine.store.num_sessions == 0
    assert {w: n for w, n in engine.store.demotions.items() if n} == {why: 1}
    engine.check()


def test_blocks_must_fit_the_tokens_exactly(engine: FakeEngine) -> None:
    blocks = engine.pool.take(1)
    with pytest.raises(AssertionError):
        engine.store.finish(
            FinishedTurn(ALICE, array(HISTORY), array([]), len(HISTORY), (Table.of(list(blocks)),))
        )


# ---- branches --------------------------------------------------------------------------------


def test_parallel_turns_of_one_session_are_branches_that_share_blocks(engine: FakeEngine) -> None:
    engine.kept(ALICE, HISTORY)
    parallel(engine, ALICE, [1], [2], [3])
    assert len(engine.store.branches(ALICE)) == 3
    assert engine.store.num_sessions == 1
    engine.check()
    own_tails = 3
    assert engine.store.pins.num_pinned == len(HISTORY) // BLOCK_SIZE + own_tails


def test_branches_per_session_are_capped_and_the_oldest_goes(engine: FakeEngine) -> None:
    for number in range(MAX_BRANCHES + 3):
        engine.kept(ALICE, [number, *HISTORY])
    kept = [int(branch.tokens[0]) for branch in engine.store.branches(ALICE)]
    assert kept == [3, 4, 5, 6]
    assert engine.store.demotions[Demotion.SUPERSEDED] == 3
    engine.check()


def test_the_cap_drops_a_superseded_branch_before_an_older_live_one(engine: FakeEngine) -> None:
    for number in range(MAX_BRANCHES):
        engine.kept(ALICE, [number, *HISTORY])
    engine.store.branches(ALICE)[2].superseded = True
    engine.kept(ALICE, [9, *HISTORY])
    assert [int(b.tokens[0]) for b in engine.store.branches(ALICE)] == [0, 1, 3, 9]


def test_a_shorter_branch_that_a_new_turn_covers_is_dropped(engine: FakeEngine) -> None:
    engine.kept(ALICE, HISTORY)
    slow = engine.start(ALICE, [*HISTORY, 1])
    quick = engine.start(ALICE, [*HISTORY, 1, 2, 3])
    engine.finish(slow)
    assert len(engine.store.branches(ALICE)) == 1
    longer = engine.finish(quick)
    assert engine.store.branches(ALICE) == (longer,)
    assert engine.store.demotions[Demotion.SUPERSEDED] == 1
    engine.check()


@pytest.mark.parametrize("output", [[], [1], [1, 2]])
def test_a_turn_that_a_branch_covers_leaves_nothing_new(
    engine: FakeEngine, output: list[int]
) -> None:
    made = engine.kept(ALICE, [*HISTORY, 1, 2])
    assert engine.turn(ALICE, HISTORY, output) is None
    assert engine.store.residencies() == [made]
    engine.check()


def test_another_session_keeps_what_it_shares_under_its_own_name(engine: FakeEngine) -> None:
    parent = engine.kept(ALICE, HISTORY)
    forked = engine.kept(BOB, [*HISTORY, 1])
    assert forked.session == BOB
    assert forked.num_turns == 1
    assert engine.store.close(BOB) == 1
    assert engine.store.residencies() == [parent]


def test_two_sessions_that_share_a_prefix_pin_each_block_once(engine: FakeEngine) -> None:
    engine.kept(ALICE, HISTORY)
    engine.kept(BOB, [*HISTORY[:20], 1, 2])
    engine.check()
    assert engine.store.pins.num_pinned == 5 + 1 + 1
    assert engine.store.pins.holders(engine.store.branches(ALICE)[0].block_ids[0]) == 2


def test_a_session_prefers_its_own_branch_to_a_newer_one_of_another_session(
    engine: FakeEngine,
) -> None:
    own = engine.kept(ALICE, HISTORY)
    engine.kept(BOB, HISTORY)
    engine.kept(stranger(1), HISTORY)
    match = engine.store.match(ALICE, array([*HISTORY, 1]), 22)
    assert (match.outcome, match.residency) == (Outcome.RESUMED, own)


def test_of_its_own_branches_a_session_prefers_the_one_it_can_continue_in_place(
    engine: FakeEngine,
) -> None:
    engine.kept(ALICE, HISTORY)
    first, second = (engine.start(ALICE, [*HISTORY, *more]) for more in ([1], [1, 2, 3]))
    engine.finish(second)
    shorter = first.borrowed
    match = engine.store.match(ALICE, array([*HISTORY, 5]), 22)
    assert match.residency is shorter
    assert match.outcome is Outcome.RESUMED


@pytest.mark.parametrize(
    ("num_further", "outcome", "num_tokens"),
    [
        (1, Outcome.RESUMED, 22),
        (BLOCK_SIZE - 1, Outcome.RESUMED, 22),
        (BLOCK_SIZE, Outcome.FORKED, 22 + BLOCK_SIZE),
    ],
)
def test_a_session_leaves_its_own_branch_only_for_one_that_saves_a_whole_block(
    engine: FakeEngine, num_further: int, outcome: Outcome, num_tokens: int
) -> None:
    """A fork computes its parent's last sampled token first, and so reaches one further."""
    engine.kept(ALICE, HISTORY)
    engine.kept(BOB, [*HISTORY, *WORDS[:num_further], 1])
    prompt = [*HISTORY, *WORDS]
    match = engine.store.match(ALICE, array(prompt), len(prompt) - 1)
    assert (match.outcome, match.num_tokens) == (outcome, num_tokens)
