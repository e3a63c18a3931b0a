# SPDX-License-Identifier: Apache-2.0
"""The picture of a run: time to first token and tokens computed, turn by turn."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.demo.report import PLUGIN, STOCK, Row

COLORS = {STOCK: "#8a8f98", PLUGIN: "#1f6feb"}
BAR_WIDTH = 0.4


def save_plot(path: Path, rows: Sequence[Row], about: dict[str, str]) -> None:
    """Two panels with a pair of bars for each turn, in the order in which they were played."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(11, 7), sharex=True)
    sides = list(rows[0].sides)
    for number, side in enumerate(sides):
        offset = (number - (len(sides) - 1) / 2) * BAR_WIDTH
        places = [place + offset for place in range(len(rows))]
        measured = [row.sides[side] for row in rows]
        look = {"width": BAR_WIDTH, "label": side, "color": COLORS[side]}
        top.bar(places, [m.ttft_ms for m in measured], **look)
        bottom.bar(places, [m.num_computed_tokens for m in measured], **look)
    _label(top, "time to first token (ms)")
    _label(bottom, "prompt tokens computed")
    initials = ["".join(word[0] for word in row.agent.split()) for row in rows]
    names = [f"{agent} {row.turn}" for agent, row in zip(initials, rows, strict=True)]
    bottom.set_xticks(range(len(rows)), names)
    bottom.set_xlabel("agent and turn, in the order played")
    figure.suptitle(
        f"{about['model']}, {about['dtype']}, vLLM {about['vllm']}, commit {about['commit']}\n"
        f"{about['machine']}, {about['date']}",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _label(axes: Axes, text: str) -> None:
    """Logarithmic: a first turn computes ten times what a later one does."""
    axes.set_yscale("log")
    axes.set_ylabel(text)
    axes.grid(axis="y", which="both", alpha=0.25)
    axes.set_axisbelow(True)
    axes.legend(loc="upper right")
