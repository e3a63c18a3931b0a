# SPDX-License-Identifier: Apache-2.0
"""What a turn finds: resumed, forked and edited contexts, step by step."""

import pytest
from recorded_engine import ALICE, BOB, HISTORY, Engine, closing_hint
from simulated_engine import expected_answer

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
