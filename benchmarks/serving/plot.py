# SPDX-License-Identifier: Apache-2.0
"""The picture of a run: time to first token, and host time, against the length of the prompt."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.serving.report import Row
from benchmarks.serving.servers import PLUGIN, SIDES, STOCK

COLORS = {STOCK: "#8a8f98", PLUGIN: "#1f6feb"}
LINES = ("-", "--", ":", "-.")


def save_plot(path: Path, rows: Sequence[Row], about: dict[str, str]) -> None:
    """A PNG: time to first token on the left; on the right, where it is known, host time."""
    panels = [("time to first token (ms)", lambda row: row.ttft_ms)]
    if all(row.host_ms for row in rows):
        panels.append(("of that, without attention (ms)", lambda row: row.host_ms))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), squeeze=False)
    for place, (label, value) in enumerate(panels):
        _draw(axes[0, place], rows, value)
        axes[0, place].set_ylabel(label)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(
        f"Median chat turn, one-layer model, vLLM {about['vllm']}, commit {about['commit']}, "
        f"{about['machine']}",
        fontsize=8,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw(axes: Axes, rows: Sequence[Row], value: Callable[[Row], dict[str, float]]) -> None:
    for line, num_messages in zip(
        LINES, dict.fromkeys(row.num_messages for row in rows), strict=False
    ):
        shown = [row for row in rows if row.num_messages == num_messages]
        places = [row.num_prompt_tokens / 1000 for row in shown]
        plural = "message" if num_messages == 1 else "messages"
        for side in SIDES:
            axes.plot(
                places,
                [value(row)[side] for row in shown],
                line,
                color=COLORS[side],
                marker=".",
                label=f"{side}, {num_messages} {plural}",
            )
    axes.set_xlabel("prompt tokens (thousands)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
