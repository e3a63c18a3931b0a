# SPDX-License-Identifier: Apache-2.0
"""The picture of a run: time to first token and tokens computed, turn by turn."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.demo.report import PLUGIN, STOCK, Row
from benchmarks.demo.turns import Measured

COLORS = {STOCK: "#8a8f98", PLUGIN: "#1f6feb"}
BAR_WIDTH = 0.4


def save_plot(path: Path, rows: Sequence[Row], about: dict[str, str]) -> None:
    """First turns on the left, later ones on the right: they differ too much for one scale."""
    parts = [
        ("first turns", [row for row in rows if row.turn == 1]),
        ("later turns, in the order played", [row for row in rows if row.turn > 1]),
    ]
    parts = [part for part in parts if part[1]]
    figure, axes = plt.subplots(
        2,
        len(parts),
        figsize=(12, 7),
        squeeze=False,
        width_ratios=[max(len(part_rows), 3) for _, part_rows in parts],
    )
    for column, (title, part_rows) in enumerate(parts):
        top, bottom = axes[0, column], axes[1, column]
        _draw(top, part_rows, lambda measured: measured.ttft_ms)
        _draw(bottom, part_rows, lambda measured: measured.num_computed_tokens)
        top.set_title(title, fontsize=10)
    axes[0, 0].set_ylabel("time to first token (ms)")
    axes[1, 0].set_ylabel("prompt tokens computed")
    axes[0, -1].legend(loc="best")
    figure.suptitle(
        f"{about['model']}, {about['dtype']}, vLLM {about['vllm']}, commit {about['commit']}, "
        f"{about['machine']}, {about['date']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw(axes: Axes, rows: Sequence[Row], value: Callable[[Measured], float]) -> None:
    """A bar for each server, side by side, for each turn."""
    sides = list(rows[0].sides)
    for number, side in enumerate(sides):
        offset = (number - (len(sides) - 1) / 2) * BAR_WIDTH
        places = [place + offset for place in range(len(rows))]
        values = [value(row.sides[side]) for row in rows]
        axes.bar(places, values, width=BAR_WIDTH, label=side, color=COLORS[side])
    axes.set_xticks(range(len(rows)), [_short_name(row) for row in rows])
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _short_name(row: Row) -> str:
    """Initials of the agent, and the turn."""
    return "".join(word[0] for word in row.agent.split()) + f" {row.turn}"
