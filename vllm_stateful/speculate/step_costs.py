# SPDX-License-Identifier: Apache-2.0
"""What one more row costs a decoding step on this machine, measured while it serves.

A step takes ``a + b * rows``: one row for each running turn and one for each drafted token. A row
more is worth its cost while it raises the tokens per second of all turns together: if its token is
accepted with more than the share of the step's time that it takes, times the tokens that the step
makes anyway. On an idle GPU ``b`` is next to nothing and nearly every draft is worth it; with many
turns, or on a CPU, few are.
"""

from __future__ import annotations

PRIOR_ROWS = (1.0, 9.0)
PRIOR_RATIO = 1.3
"""A step of nine rows is expected to take so many times as long as one of one row."""

PRIOR_WEIGHT = 2.0
"""Steps that the prior counts as, at each of its ends."""

DECAY = 0.995
"""How much less each earlier step counts than the one after it."""

MOST_TIMES = 3.0
"""A step that takes so many times as long as expected was held up by something else."""

LEAST_CHANCE = 0.1
"""No token is drafted with a smaller chance, however cheap a row is: the host has work, too."""


class StepCosts:
    """A line through the times of steps, the last few hundred above all. Not thread-safe."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def saw(self, num_rows: int, seconds: float) -> None:
        """A step that only decoded took so long."""
        if num_rows < 1 or seconds <= 0.0:
            return
        if not self._weight:
            base = seconds / (1 + (PRIOR_RATIO - 1) * (num_rows - 1) / (PRIOR_ROWS[1] - 1))
            for rows, ratio in zip(PRIOR_ROWS, (1.0, PRIOR_RATIO), strict=True):
                self._add(rows, base * ratio, PRIOR_WEIGHT)
        fixed, row = self.line()
        self._add(float(num_rows), min(seconds, MOST_TIMES * (fixed + row * num_rows)), 1.0)

    def line(self) -> tuple[float, float]:
        """Seconds of a step without rows, and of each row; neither is negative."""
        if not self._weight:
            return 1.0, (PRIOR_RATIO - 1) / (PRIOR_ROWS[1] - 1)
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x**2
        row = (self._xy / self._weight - mean_x * mean_y) / spread if spread > 1e-9 else 0.0
        row = min(max(row, 0.0), mean_y / mean_x)
        return mean_y - row * mean_x, row

    def least_chance(self, num_running: int, num_accepted: float) -> float:
        """The chance that a drafted token must have to be worth its row.

        Args:
            num_running: turns that decode in the step.
            num_accepted: drafted tokens that a step accepts of all of them, on average.
        """
        fixed, row = self.line()
        made = num_running + num_accepted
        time = fixed + row * made
        return max(LEAST_CHANCE, row * made / time) if time > 0 else LEAST_CHANCE

    def _add(self, rows: float, seconds: float, weight: float) -> None:
        for name, value in (
            ("_weight", 1.0),
            ("_x", rows),
            ("_y", seconds),
            ("_xx", rows * rows),
            ("_xy", rows * seconds),
        ):
            setattr(self, name, getattr(self, name) * DECAY + weight * value)
