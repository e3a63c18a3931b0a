# SPDX-License-Identifier: Apache-2.0
"""What one more row costs a decoding step on this machine, measured while it serves.

A step has one row for each running turn and one for each drafted token. As long as it waits for the
weights, a row more is nearly free; from some number on the arithmetic counts, and each row takes as
long as the one before: ``a + b * rows + c * max(0, rows - bend)``. A row is worth its cost while it
raises the tokens per second of all turns together: if its token is accepted with more than the
share of the step's time that it takes, times the tokens that the step makes anyway. So a single
turn is drafted boldly, and when many run only what is nearly certain, or nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
"""Steps of about as many rows count as one."""

BENDS = (2, 4, 8, 16, 32, 64, 128, 256)

PRIOR_ROWS = (1.0, 9.0)
PRIOR_RATIO = 1.3
"""A step of nine rows is expected to take so many times as long as one of one row."""

PRIOR_WEIGHT = 2.0
"""Steps that the prior counts as, at each of its ends."""

DECAY = 0.995
"""How much less each earlier step counts than the one after it."""

LEAST_WEIGHT = 0.05
"""Steps that a bucket must count as, or it is forgotten."""

MOST_TIMES = 2.0
"""A step that takes so many times as long as expected was held up by something else."""

STEPS_A_FIT = 64

LEAST_CHANCE = 0.15
"""No token is drafted with a smaller chance, however cheap a row is: the host has work, too."""

Floats = NDArray[np.float64]


class StepCosts:
    """A bent line through the times of steps, the last few hundred above all. Not thread-safe."""

    def __init__(self) -> None:
        self._weights = np.zeros(len(BUCKETS))
        self._rows = np.zeros(len(BUCKETS))
        self._seconds = np.zeros(len(BUCKETS))
        self._num_steps = 0
        self._fitted = (1.0, (PRIOR_RATIO - 1) / (PRIOR_ROWS[1] - 1), 0.0, 0.0)

    def saw(self, num_rows: int, seconds: float) -> None:
        """A step that only decoded took so long."""
        if num_rows < 1 or seconds <= 0.0:
            return
        if not self._num_steps:
            base = seconds / (1 + (PRIOR_RATIO - 1) * (num_rows - 1) / (PRIOR_ROWS[1] - 1))
            for rows, ratio in zip(PRIOR_ROWS, (1.0, PRIOR_RATIO), strict=True):
                self._add(rows, base * ratio, PRIOR_WEIGHT)
            self._fit()
        self._num_steps += 1
        self._weights *= DECAY
        self._rows *= DECAY
        self._seconds *= DECAY
        self._add(num_rows, min(seconds, MOST_TIMES * self.seconds(num_rows)), 1.0)
        if self._num_steps % STEPS_A_FIT == 0:
            self._fit()

    def seconds(self, num_rows: float) -> float:
        """How long a step takes; in an arbitrary unit before the first was seen."""
        fixed, row, more, bend = self._fitted
        return fixed + row * num_rows + more * max(0.0, num_rows - bend)

    def seconds_a_row(self, num_rows: float) -> float:
        """How much longer it takes with one row more."""
        _, row, more, bend = self._fitted
        return row + (more if num_rows >= bend else 0.0)

    def least_chance(self, num_running: int, num_drafted: float, num_accepted: float) -> float:
        """The chance that a drafted token must have to be worth its row.

        Args:
            num_running: turns that decode in the step.
            num_drafted: tokens that are drafted for all of them, on average.
            num_accepted: and how many of those a step accepts.
        """
        rows = num_running + num_drafted
        share = self.seconds_a_row(rows) / self.seconds(rows)
        return max(LEAST_CHANCE, share * (num_running + num_accepted))

    def _add(self, num_rows: float, seconds: float, weight: float) -> None:
        bucket = min(int(np.searchsorted(BUCKETS, num_rows)), len(BUCKETS) - 1)
        self._weights[bucket] += weight
        self._rows[bucket] += weight * num_rows
        self._seconds[bucket] += weight * seconds

    def _fit(self) -> None:
        """The bend, and the line at either side of it, with the least squares; none falls."""
        seen = self._weights > LEAST_WEIGHT
        weights = self._weights[seen]
        rows, seconds = self._rows[seen] / weights, self._seconds[seen] / weights
        best = float("inf")
        for bend in (0.0, *(bend for bend in BENDS if rows[0] < bend < rows[-1])):
            behind = np.maximum(0.0, rows - bend)
            for columns in ([rows, behind], [behind]) if bend else ([rows], []):
                found = _solved([np.ones_like(rows), *columns], seconds, weights)
                if found is None or found[1] >= best * 0.999:
                    continue
                (fixed, *slopes), best = found
                more = slopes[-1] if bend else 0.0
                row = slopes[0] if len(slopes) > bool(bend) else 0.0
                self._fitted = (float(fixed), float(row), float(more), bend)


def _solved(columns: list[Floats], seconds: Floats, weights: Floats) -> tuple[Floats, float] | None:
    """Weighted least squares, and the squares that are left; None where a factor is negative."""
    scale = np.sqrt(weights)
    matrix = np.stack(columns, axis=1) * scale[:, None]
    square = matrix.T @ matrix
    square[np.diag_indices_from(square)] *= 1 + 1e-12  # buckets of few steps may lie on one line
    found = np.linalg.solve(square, matrix.T @ (seconds * scale))
    if (found < -1e-12).any():
        return None
    return found, float(((matrix @ found - seconds * scale) ** 2).sum()) + 1e-15
