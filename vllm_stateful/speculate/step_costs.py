# SPDX-License-Identifier: Apache-2.0
"""What one more row costs a decoding step on this machine, measured while it serves.

A step has one row for each running turn and one for each drafted token. With few rows, a step waits
for the weights and one more row is nearly free; from some number of rows on, the arithmetic counts.
Each row also attends to the context before it. A GPU reads that context once for all rows of a
turn, a CPU once for each row. So the time of a step is modelled as

    seconds = fixed + row * rows + more * max(0, rows - bend) + attend * (sum of rows' contexts)

with no negative factor, fitted to the last few hundred steps. A row is worth its cost if it raises
the tokens per second of all turns together. That is so if the chance that its token is accepted
exceeds the row's share of the step's time, times the tokens that the step makes anyway. So a single
turn with a short context is drafted boldly; when many turns run, only nearly certain tokens are
drafted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vllm_stateful.speculate.compiled import compiled

BENDS = (0, 4, 8, 16, 32, 64, 128)
"""Numbers of rows that are tried as the bend, beyond which a row takes longer; 0 means no bend."""

PRIOR_STEPS = ((1.0, 0.0, 1.0), (9.0, 0.0, 1.3), (9.0, 9_000.0, 1.35))
"""Steps that are assumed before much is measured: the rows, the sum of their contexts in tokens,
and the time as a multiple of that of a step with one row."""

PRIOR_WEIGHT = 2.0
"""The number of measured steps that each of these counts as."""

PRIOR_SECONDS = 0.02
"""Seconds that a step of one row is assumed to take before the first step is measured."""

DECAY = 0.995
"""The weight of a step, relative to the step after it."""

MOST_TIMES = 2.0
"""A step's time counts as at most this multiple of the expected time: what is beyond that had
another cause."""

LEAST_SECONDS = 1e-5
"""The shortest time that is predicted. Measured times that contradict each other may leave all
factors but ``attend`` at 0."""

STEPS_A_FIT = 64
"""Steps from one fit of the factors to the next."""

LEAST_CHANCE = 0.15
"""No token with a smaller chance is drafted, however cheap a row is: drafts are work for the host,
too."""

_FIXED, _ROW, _MORE, _ATTEND = range(4)
_KILO = 1e-3
Floats = NDArray[np.float64]


class StepCosts:
    """Predicts the time of a step from its rows and contexts. Not thread-safe."""

    def __init__(self) -> None:
        self._squares = np.zeros((len(BENDS), 4, 4))
        self._products = np.zeros((len(BENDS), 4))
        self._sum = np.zeros(1)
        """Shape ``[1]``: the weighted sum of the squared seconds."""
        self._num_steps = 0
        self._bend = 0.0
        self._factors = np.zeros(4)
        self._begin(PRIOR_SECONDS)

    def saw(self, num_rows: int, num_attended: int, seconds: float) -> None:
        """Learn from the time of a step that only decoded.

        Args:
            num_rows: tokens that were computed.
            num_attended: the sum of their contexts, in tokens.
            seconds: the time of the whole step.
        """
        if num_rows < 1 or seconds <= 0.0:
            return
        if not self._num_steps:
            self._begin(seconds / self.seconds(num_rows, num_attended) * self.seconds(1, 0))
        self._num_steps += 1
        expected = self.seconds(num_rows, num_attended)
        if expected > LEAST_SECONDS:  # otherwise the factors learned so far must be wrong
            seconds = min(seconds, MOST_TIMES * expected)
        self._add(num_rows, num_attended, seconds, 1.0)
        if self._num_steps % STEPS_A_FIT == 0 or self._num_steps in (4, 8, 16):
            self._fit()

    def seconds(self, num_rows: float, num_attended: float) -> float:
        """The predicted time of a step, in seconds."""
        fixed, row, more, attend = self._factors
        bent = max(0.0, num_rows - self._bend)
        found = float(fixed + row * num_rows + more * bent + attend * num_attended * _KILO)
        return max(LEAST_SECONDS, found)

    def seconds_a_row(self, num_rows: float, context: float) -> float:
        """The seconds that one more row adds, whose context has ``context`` tokens."""
        _, row, more, attend = self._factors
        return float(row + (more if num_rows >= self._bend else 0.0) + attend * context * _KILO)

    def least_chance(
        self, num_rows: float, num_attended: float, num_made: float, context: int
    ) -> float:
        """The chance that a drafted token must have to be worth its row.

        Args:
            num_rows: the rows of the step, with the average number of drafted ones.
            num_attended: the sum of the contexts of those rows, in tokens.
            num_made: the tokens that the step makes from those rows.
            context: the context of the turn that is drafted, in tokens.
        """
        share = self.seconds_a_row(num_rows, context) / self.seconds(num_rows, num_attended)
        return max(LEAST_CHANCE, share * num_made)

    def _begin(self, seconds: float) -> None:
        """Start from ``PRIOR_STEPS`` on a machine where a step of one row takes ``seconds``."""
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
    """Add one step to the sums of all bends. Its error counts relative to its own time."""
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
    """Fill ``factors`` with those that fit best, and return the bend that they belong to."""
    best, best_bend = np.inf, 0.0
    for place in range(len(_BENDS)):
        square, product = squares[place], products[place]
        found = _solved(square, product, _BENDS[place] > 0)
        left = total[0]
        for one in range(4):
            left -= 2 * found[one] * product[one]
            for other in range(4):
                left += found[one] * square[one, other] * found[other]
        if left < best * 0.99:  # a bend must reduce the error by 1 % or more
            best, best_bend = left, _BENDS[place]
            factors[:] = found
    return best_bend


@compiled
def _solved(square: Floats, product: Floats, uses_bend: bool) -> Floats:
    """Solve least squares without negative factors: the most negative one is left out each time."""
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
    """Solve the normal equations by elimination. Factors that are not used are 0."""
    rows = np.zeros((4, 5))
    for one in range(4):
        if not used[one]:
            rows[one, one] = 1.0
            continue
        for other in range(4):
            if used[other]:
                rows[one, other] = square[one, other]
        # The small summands keep the equations solvable when all steps lie on one line.
        rows[one, one] = square[one, one] * (1 + 1e-9) + 1e-12
        rows[one, 4] = product[one]
    for pivot in range(4):
        rows[pivot] /= rows[pivot, pivot]
        for other in range(4):
            if other != pivot:
                rows[other] -= rows[other, pivot] * rows[pivot]
    return rows[:, 4].copy()
