# SPDX-License-Identifier: Apache-2.0
"""The line through the times of steps, and what it says about drafts."""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from vllm_stateful.speculate.step_costs import LEAST_CHANCE, StepCosts


def measured(
    fixed: float, row: float, more: float = 0.0, attend: float = 0.0, *, noise: float = 0.0
) -> StepCosts:
    """A machine whose rows cost ``more`` from the eighth on, and ``attend`` for each token."""
    chance = random.Random(0)
    costs = StepCosts()
    for _ in range(500):
        rows = chance.randint(1, 32)
        attended = rows * chance.choice([100, 2000, 6000])
        seconds = fixed + row * rows + more * max(0, rows - 8) + attend * attended
        costs.saw(rows, attended, seconds * (1 + noise * chance.uniform(-1, 1)))
    return costs


def test_a_straight_line_is_found() -> None:
    costs = measured(0.010, 0.001)
    assert costs.seconds(1, 100) == pytest.approx(0.011, rel=0.1)
    assert costs.seconds(30, 100) == pytest.approx(0.040, rel=0.1)
    assert costs.seconds_a_row(5, 100) == pytest.approx(0.001, rel=0.2)


def test_rows_that_are_free_up_to_a_bend_are_known() -> None:
    costs = measured(0.040, 0.0, 0.003, noise=0.05)
    assert costs.seconds_a_row(4, 100) < 0.0005
    assert costs.seconds_a_row(16, 100) == pytest.approx(0.003, rel=0.2)
    assert costs.least_chance(4, 400, 3.0, 100) == LEAST_CHANCE
    assert costs.least_chance(24, 2400, 20.0, 100) > 0.5


def test_a_row_behind_a_long_context_costs_more_where_attention_does() -> None:
    """A CPU: 14 ms for each row behind 4,000 tokens, 4 ms behind 100."""
    costs = measured(0.055, 0.0037, attend=0.0000026, noise=0.05)
    assert costs.seconds_a_row(4, 4000) == pytest.approx(0.0141, rel=0.15)
    assert costs.seconds_a_row(4, 100) == pytest.approx(0.004, rel=0.3)
    short, long = (costs.least_chance(4, 4 * context, 2.0, context) for context in (100, 4000))
    assert short < 0.2 < long


def test_a_step_that_was_held_up_hardly_counts() -> None:
    costs = measured(0.010, 0.001)
    for _ in range(3):
        costs.saw(4, 400, 5.0)
    assert costs.seconds_a_row(4, 100) == pytest.approx(0.001, rel=0.3)


def test_steps_of_one_size_leave_the_prior() -> None:
    costs = StepCosts()
    for _ in range(50):
        costs.saw(1, 500, 0.010)
    assert 0 < costs.seconds_a_row(1, 500) < 0.1 * costs.seconds(1, 500)


def test_cheap_rows_are_worth_nearly_any_draft_and_dear_ones_few() -> None:
    assert measured(0.010, 0.00001).least_chance(3, 300, 2.0, 100) == LEAST_CHANCE
    assert measured(0.0001, 0.010).least_chance(3, 300, 2.0, 100) > 0.6


def test_the_more_turns_run_the_better_a_draft_must_be() -> None:
    costs = measured(0.010, 0.001, noise=0.2)
    chances = [costs.least_chance(num, num * 100, num * 1.1, 100) for num in (1, 4, 16, 64)]
    assert chances == sorted(chances)
    assert chances[0] < 0.3
    assert chances[-1] > 0.85


def test_a_machine_that_becomes_slower_is_noticed() -> None:
    costs = measured(0.010, 0.0001)
    for n in range(2000):
        costs.saw(1 + n % 8, 100, 0.010 + 0.004 * (1 + n % 8))
    assert costs.seconds_a_row(4, 100) == pytest.approx(0.004, rel=0.3)


def test_nonsense_is_left_out() -> None:
    costs = StepCosts()
    costs.saw(0, 0, 1.0)
    costs.saw(1, 100, 0.0)
    assert costs.seconds(3, 300) == StepCosts().seconds(3, 300)


def test_times_that_contradict_each_other_end_nothing() -> None:
    """Slow steps of one row, then a fast one of nine: only contexts seem to cost anything."""
    costs = StepCosts()
    for seconds in (2.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0):
        costs.saw(1, 0, seconds)
    costs.saw(9, 145, 0.03125)
    for _ in range(200):
        costs.saw(1, 0, 1.0)
    assert 0.01 < costs.seconds(1, 0) < 10.0


STEPS = st.tuples(st.integers(1, 2000), st.integers(0, 10**8), st.floats(1e-6, 10.0))


@given(st.lists(STEPS, max_size=300))
@settings(deadline=None)  # numba compiles in the first one
def test_no_times_make_a_row_free_of_cost_or_a_step_of_time(
    steps: list[tuple[int, int, float]],
) -> None:
    costs = StepCosts()
    for rows, attended, seconds in steps:
        costs.saw(rows, attended, seconds)
    assert costs.seconds(1, 1) > 0
    assert costs.seconds_a_row(1, 0) >= 0
    assert costs.seconds_a_row(100, 100) >= costs.seconds_a_row(1, 100)
    assert costs.least_chance(4, 400, 4.0, 100) >= LEAST_CHANCE
