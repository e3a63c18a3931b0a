# SPDX-License-Identifier: Apache-2.0
"""The picture of a run: the whole turn, time to first token and tokens computed, turn by turn."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.demo.report import Row
from benchmarks.demo.sides import COLORS
from benchmarks.demo.turns import Measured

FILL = 0.84
"""Share of a turn's place that its bars take."""

PANELS: tuple[tuple[str, Callable[[Measured], float]], ...] = (
    ("whole turn (s)", lambda measured: measured.total_s),
    ("time to first token (s)", lambda measured: measured.ttft_ms / 1000),
    ("prompt tokens computed", lambda measured: measured.num_computed_tokens),
)


def save_plot(path: Path, rows: Sequence[Row], about: dict[str, str]) -> None:
    """First turns on the left, later ones on the right: they differ too much for one scale."""
    parts = [
        ("first turns", [row for row in rows if row.turn == 1]),
        ("later turns, in the order played; lines: medians", [row for row in rows if row.turn > 1]),
    ]
    parts = [part for part in parts if part[1]]
    figure, axes = plt.subplots(
        len(PANELS),
        len(parts),
        figsize=(12, 9),
        squeeze=False,
        width_ratios=[max(len(part_rows), 3) for _, part_rows in parts],
    )
    for column, (title, part_rows) in enumerate(parts):
        for line, (label, value) in enumerate(PANELS):
            _draw(axes[line, column], part_rows, value)
            if column == 0:
                axes[line, column].set_ylabel(label)
        axes[0, column].set_title(title, fontsize=10)
    top = axes[0, -1]
    top.set_ylim(top=1.18 * top.get_ylim()[1])
    top.legend(loc="upper center", ncols=len(COLORS))
    figure.suptitle(
        f"{about['model']}, {about['dtype']}, vLLM {about['vllm']}, commit {about['commit']}, "
        f"{about['machine']}, {about['date']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(axes: Axes, rows: Sequence[Row], value: Callable[[Measured], float]) -> None:
    """A bar for each server, side by side, for each turn; of later turns the median as a line."""
    sides = list(rows[0].sides)
    width = FILL / len(sides)
    for number, side in enumerate(sides):
        offset = (number - (len(sides) - 1) / 2) * width
        places = [place + offset for place in range(len(rows))]
        values = [value(row.sides[side]) for row in rows]
        axes.bar(places, values, width=width, label=side, color=COLORS[side])
        if rows[0].turn > 1:
            axes.axhline(statistics.median(values), color=COLORS[side], linewidth=1, alpha=0.8)
    axes.set_xticks(range(len(rows)), [row.short_name for row in rows])
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
