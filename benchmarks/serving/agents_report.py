# SPDX-License-Identifier: Apache-2.0
"""Tables and picture of the agents' workloads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.serving.agents_play import Drafts, Sample
from benchmarks.serving.servers import NGRAM, PLUGIN, STOCK
from benchmarks.serving.tables import markdown, percentile, ratio

SIDES = (STOCK, NGRAM, PLUGIN)
COLORS = {STOCK: "#8a8f98", NGRAM: "#d29922", PLUGIN: "#1f6feb"}


@dataclass(frozen=True)
class Row:
    """The turns of one workload in one mode, by side.

    Attributes:
        total_ms: From sending the request to the end of the answer: median, p90 and p99.
        ttft_ms: Its first text: median.
        tokens_per_step: Generated tokens by steps that generated any for them.
        drafted_per_accepted: 0 where nothing was accepted.
    """

    mode: str
    workload: str
    num_turns: int
    num_unequal: int
    total_ms: dict[str, tuple[float, float, float]]
    all_ms: dict[str, float]
    ttft_ms: dict[str, float]
    tokens_per_step: dict[str, float]
    drafted_per_accepted: dict[str, float]


def make_rows(samples: Sequence[Sample], drafts: Sequence[Drafts]) -> list[Row]:
    """One for each workload in each mode; a turn that failed on one side is left out of all."""
    failed = {_key(sample) for sample in samples if sample.error}
    answered = [sample for sample in samples if _key(sample) not in failed]
    groups = dict.fromkeys((sample.mode, sample.workload) for sample in answered)
    return [_row(*group, answered, drafts) for group in groups]


def _key(sample: Sample) -> tuple[str, str, str, int]:
    return sample.mode, sample.workload, sample.conversation, sample.turn


def _row(mode: str, workload: str, samples: Sequence[Sample], drafts: Sequence[Drafts]) -> Row:
    mine = [s for s in samples if (s.mode, s.workload) == (mode, workload)]
    sides = [side for side in SIDES if any(sample.side == side for sample in mine)]
    of = {side: [sample for sample in mine if sample.side == side] for side in sides}
    total = {side: [sample.total_ms for sample in of[side]] for side in sides}
    drafted = {d.side: d for d in drafts if (d.mode, d.workload) == (mode, workload)}
    return Row(
        mode,
        workload,
        len(mine) // len(sides),
        sum(not sample.is_equal for sample in mine),
        {
            side: (percentile(t, 0.5), percentile(t, 0.9), percentile(t, 0.99))
            for side, t in total.items()
        },
        {side: sum(t) for side, t in total.items()},
        {side: percentile([s.ttft_ms for s in of[side]], 0.5) for side in sides},
        {side: d.num_generated / (d.num_generated - d.num_accepted) for side, d in drafted.items()},
        {side: d.num_drafted / max(1, d.num_accepted) for side, d in drafted.items()},
    )


def table(rows: Sequence[Row]) -> str:
    """All workloads; times in seconds, ratios of medians and of the sums of all turns."""
    sides = list(rows[0].total_ms) if rows else []
    head = ["mode", "workload", "turns"]
    head += [f"turn, {side}: median / p90 / p99 (s)" for side in sides]
    head += [f"{side} / plugin: median / all" for side in sides if side != PLUGIN]
    head += ["TTFT " + " / ".join(sides) + " (s)"]
    head += [f"tokens a step, {side} (drafted for each accepted)" for side in sides[1:]]
    lines = []
    for row in rows:
        line = [row.mode, row.workload, str(row.num_turns)]
        line += [" / ".join(f"{ms / 1000:.2f}" for ms in row.total_ms[side]) for side in sides]
        line += [_ratios(row, side) for side in sides if side != PLUGIN]
        line += [" / ".join(f"{row.ttft_ms[side] / 1000:.2f}" for side in sides)]
        line += [
            f"{row.tokens_per_step[side]:.2f} ({row.drafted_per_accepted[side]:.2f})"
            for side in sides[1:]
        ]
        lines.append(line)
    return markdown(head, lines)


def _ratios(row: Row, side: str) -> str:
    if PLUGIN not in row.total_ms:
        return "-"
    median = ratio(row.total_ms[side][0], row.total_ms[PLUGIN][0])
    return f"{median} / {ratio(row.all_ms[side], row.all_ms[PLUGIN])}"


def faults(samples: Sequence[Sample], rows: Sequence[Row]) -> list[str]:
    """Failed turns, and how many answers were others."""
    lines = [
        f"{s.mode} {s.workload} {s.side} {s.conversation} {s.turn}: {s.error}" for s in samples
    ]
    lines = [line for line, sample in zip(lines, samples, strict=True) if sample.error]
    lines += [
        f"{row.mode} {row.workload}: {row.num_unequal} answers are others than expected"
        for row in rows
        if row.num_unequal
    ]
    return lines


def document(
    about: dict[str, Any], rows: Sequence[Row], drafts: Sequence[Drafts]
) -> dict[str, Any]:
    """All but the samples."""
    return about | {"rows": [vars(r) for r in rows], "drafts": [vars(d) for d in drafts]}


def save_plot(path: Path, samples: Sequence[Sample], about: dict[str, Any]) -> None:
    """A PNG: for each workload, the median time of each turn on each side."""
    groups = list(dict.fromkeys((sample.mode, sample.workload) for sample in samples))
    columns = min(5, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.4 * columns, 3 * lines), squeeze=False)
    for place, (mode, workload) in enumerate(groups):
        mine = [s for s in samples if (s.mode, s.workload) == (mode, workload) and not s.error]
        _draw(axes[place // columns, place % columns], mine)
        axes[place // columns, place % columns].set_title(f"{workload}, {mode}", fontsize=9)
    axes[0, 0].legend(fontsize=8)
    axes[0, 0].set_ylabel("time of a turn (s)")
    figure.suptitle(
        f"vLLM {about['vllm']}, commit {about['commit']}, {about['machine']}", fontsize=8
    )
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw(axes: Axes, samples: Sequence[Sample]) -> None:
    for side in SIDES:
        by_turn: dict[int, list[float]] = {}
        for sample in samples:
            if sample.side == side:
                by_turn.setdefault(sample.turn, []).append(sample.total_ms / 1000)
        turns = sorted(by_turn)
        medians = [percentile(by_turn[turn], 0.5) for turn in turns]
        axes.plot([t + 1 for t in turns], medians, color=COLORS[side], marker=".", label=side)
    axes.set_xlabel("turn")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
