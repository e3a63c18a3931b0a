# SPDX-License-Identifier: Apache-2.0
"""The line through the times of steps, and what it says about drafts."""

import random

import pytest

from vllm_stateful.speculate.step_costs import LEAST_CHANCE, StepCosts


def measured(fixed: float, row: float, num_steps: int = 500, noise: float = 0.0) -> StepCosts:
    chance = random.Random(0)
    costs = StepCosts()
    for _ in range(num_steps):
        rows = chance.randint(1, 16)
        costs.saw(rows, (fixed + row * rows) * (1 + noise * chance.random()))
    return costs


def test_the_line_is_found() -> None:
    fixed, row = measured(0.010, 0.001).line()
    assert fixed == pytest.approx(0.010, rel=0.1)
    assert row == pytest.approx(0.001, rel=0.1)


def test_a_step_that_was_held_up_hardly_counts() -> None:
    costs = measured(0.010, 0.001)
    costs.saw(4, 5.0)
    assert costs.line()[1] == pytest.approx(0.001, rel=0.3)


def test_steps_of_one_size_leave_the_prior() -> None:
    costs = StepCosts()
    for _ in range(50):
        costs.saw(1, 0.010)
    fixed, row = costs.line()
    assert 0 < row < 0.1 * fixed


def test_cheap_rows_are_worth_nearly_any_draft_and_dear_ones_few() -> None:
    assert measured(0.010, 0.00001).least_chance(1, 1.0) == LEAST_CHANCE
    assert measured(0.0001, 0.010).least_chance(1, 1.0) > 0.9


def test_the_more_turns_run_the_better_a_draft_must_be() -> None:
    costs = measured(0.010, 0.001, noise=0.2)
    chances = [costs.least_chance(num, num * 1.0) for num in (1, 4, 16, 64)]
    assert chances == sorted(chances)
    assert chances[0] < 0.3
    assert chances[-1] > 0.85


def test_a_machine_that_becomes_slower_is_noticed() -> None:
    costs = measured(0.010, 0.0001)
    for n in range(1000):
        costs.saw(1 + n % 8, 0.010 + 0.004 * (1 + n % 8))
    assert costs.line()[1] == pytest.approx(0.004, rel=0.3)


def test_nonsense_is_left_out() -> None:
    costs = StepCosts()
    costs.saw(0, 1.0)
    costs.saw(1, 0.0)
    assert costs.line() == StepCosts().line()
