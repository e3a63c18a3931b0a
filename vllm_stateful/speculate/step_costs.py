# SPDX-License-Identifier: Apache-2.0
"""What one more row costs a decoding step on this machine, measured while it serves.

A step has one row for each running turn and one for each drafted token. As long as it waits for the
weights, a row more is nearly free; from some number on the arithmetic counts. And each row attends
to the context before it, which a GPU reads once for all rows of a turn, and a CPU once for each. So

    seconds = fixed + row * rows + more * max(0, rows - bend) + attend * (sum of rows' contexts)

with no factor negative, fitted to the last few hundred steps. A row is worth its cost while it
raises the tokens per second of all turns together: if its token is accepted with more than the
share of the step's time that it takes, times the tokens that the step makes anyway. So a single
turn with a short context is drafted boldly, and when many run only what is nearly certain.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vllm_stateful.speculate.compiled import compiled

BENDS = (0, 4, 8, 16, 32, 64, 128)
"""Rows from which each may take longer; 0 is no bend at all."""

PRIOR_STEPS = ((1.0, 0.0, 1.0), (9.0, 0.0, 1.3), (9.0, 9_000.0, 1.35))
"""What is expected before much is measured: rows, their contexts in all, and times as long."""

PRIOR_WEIGHT = 2.0
"""Steps that each of these counts as."""

PRIOR_SECONDS = 0.02

DECAY = 0.995
"""How much less each earlier step counts than the one after it."""

MOST_TIMES = 2.0
"""A step that takes so many times as long as expected was held up by something else."""

LEAST_SECONDS = 1e-5
"""No step takes less. Times that contradict each other may leave no factor but that of contexts."""

STEPS_A_FIT = 64

LEAST_CHANCE = 0.15
"""No token is drafted with a smaller chance, however cheap a row is: the host has work, too."""

_FIXED, _ROW, _MORE, _ATTEND = range(4)
_KILO = 1e-3
Floats = NDArray[np.float64]


class StepCosts:
    """The times of steps by their rows and contexts. Not thread-safe."""

    def __init__(self) -> None:
        self._squares = np.zeros((len(BENDS), 4, 4))
        self._products = np.zeros((len(BENDS), 4))
        self._sum = np.zeros(1)
        """The sum of the squared seconds."""
        self._num_steps = 0
        self._bend = 0.0
        self._factors = np.zeros(4)
        self._begin(PRIOR_SECONDS)

    def saw(self, num_rows: int, num_attended: int, seconds: float) -> None:
        """A step that only decoded took so long.

        Args:
            num_rows: tokens that were computed.
            num_attended: the sum of their contexts, in tokens.
            seconds: of the whole step.
        """
        if num_rows < 1 or seconds <= 0.0:
            return
        if not self._num_steps:
            self._begin(seconds / self.seconds(num_rows, num_attended) * self.seconds(1, 0))
        self._num_steps += 1
        expected = self.seconds(num_rows, num_attended)
        if expected > LEAST_SECONDS:  # else what was learned so far cannot be right
            seconds = min(seconds, MOST_TIMES * expected)
        self._add(num_rows, num_attended, seconds, 1.0)
        if self._num_steps % STEPS_A_FIT == 0 or self._num_steps in (4, 8, 16):
            self._fit()

    def seconds(self, num_rows: float, num_attended: float) -> float:
        """How long a step takes."""
        fixed, row, more, attend = self._factors
        bent = max(0.0, num_rows - self._bend)
        found = float(fixed + row * num_rows + more * bent + attend * num_attended * _KILO)
        return max(LEAST_SECONDS, found)

    def seconds_a_row(self, num_rows: float, context: float) -> float:
        """How much longer it takes with one row more, behind so many tokens."""
        _, row, more, attend = self._factors
        return float(row + (more if num_rows >= self._bend else 0.0) + attend * context * _KILO)

    def least_chance(
        self, num_rows: float, num_attended: float, num_made: float, context: int
    ) -> float:
        """The chance that a drafted token must have to be worth its row.

        Args:
            num_rows: of the step, drafted ones as they are on average.
            num_attended: the sum of the contexts of those rows, in tokens.
            num_made: tokens that the step makes of them.
            context: of the turn that is drafted, in tokens.
        """
        share = self.seconds_a_row(num_rows, context) / self.seconds(num_rows, num_attended)
        return max(LEAST_CHANCE, share * num_made)

    def _begin(self, seconds: float) -> None:
        """Expect what is usual for a machine on which a step of one row takes so long."""
        for sums in (self._squares, self._products, self._sum):
            sums[:] = 0.0
        for rows, attended, times in PRIOR_STEPS:
            self._add(rows, attended, seconds * times, PRIOR_WEIGHT)
        self._fit()

    def _add(self, rows: float, attended: float, seconds: float, weight: float) -> None:
        attended *= _KILO
        _add(self._squares, self._products, self._sum, rows, attended, seconds, weight)

    def _fit(self) -> None:
        self._bend = _fit(self._squares, self._products, self._sum, self._factors)


_BENDS = np.array(BENDS, np.float64)


@compiled
def _add(
    squares: Floats,
    products: Floats,
    total: Floats,
    rows: float,
    attended: float,
    seconds: float,
    weight: float,
) -> None:
    """One more step; it counts by how far it is from what was expected as a share of it."""
    weight /= seconds * seconds
    total[0] = total[0] * DECAY + weight * seconds * seconds
    column = np.empty(4)
    for place in range(len(_BENDS)):
        bend = _BENDS[place]
        column[_FIXED], column[_ROW], column[_ATTEND] = 1.0, rows, attended
        column[_MORE] = max(0.0, rows - bend) if bend > 0 else 0.0
        for one in range(4):
            product = weight * seconds * column[one]
            products[place, one] = products[place, one] * DECAY + product
            for other in range(4):
                square = weight * column[one] * column[other]
                squares[place, one, other] = squares[place, one, other] * DECAY + square


@compiled
def _fit(squares: Floats, products: Floats, total: Floats, factors: Floats) -> float:
    """Fills ``factors``; the bend."""
    best, best_bend = np.inf, 0.0
    for place in range(len(_BENDS)):
        square, product = squares[place], products[place]
        found = _solved(square, product, _BENDS[place] > 0)
        left = total[0]
        for one in range(4):
            left -= 2 * found[one] * product[one]
            for other in range(4):
                left += found[one] * square[one, other] * found[other]
        if left < best * 0.99:  # a bend must be worth it
            best, best_bend = left, _BENDS[place]
            factors[:] = found
    return best_bend


@compiled
def _solved(square: Floats, product: Floats, uses_bend: bool) -> Floats:
    """Least squares without negative factors: those that would be are left out one by one."""
    used = np.ones(4, np.bool_)
    used[_MORE] = uses_bend
    while used.any():
        factors = _eliminated(square, product, used)
        worst = int(factors.argmin())
        if factors[worst] >= 0:
            return factors
        used[worst] = False
    return np.zeros(4)


@compiled
def _eliminated(square: Floats, product: Floats, used: NDArray[np.bool_]) -> Floats:
    """The solution of the normal equations; 0 for what is not used."""
    rows = np.zeros((4, 5))
    for one in range(4):
        if not used[one]:
            rows[one, one] = 1.0
            continue
        for other in range(4):
            if used[other]:
                rows[one, other] = square[one, other]
        rows[one, one] = square[one, one] * (1 + 1e-9) + 1e-12  # steps may lie on one line
        rows[one, 4] = product[one]
    for pivot in range(4):
        rows[pivot] /= rows[pivot, pivot]
        for other in range(4):
            if other != pivot:
                rows[other] -= rows[other, pivot] * rows[pivot]
    return rows[:, 4].copy()
