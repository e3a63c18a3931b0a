# SPDX-License-Identifier: Apache-2.0
"""Tables from the rows of `benchmarks.gpu.serving`, whatever of them there is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from benchmarks.gpu.serving_plays import AGENTS, LONG, TOGETHER
from benchmarks.gpu.serving_sides import STOCK

Row = dict[str, Any]
MOST_CHARS = 160
NONE = "-"


def tables(rows: Iterable[Row]) -> str:
    """All of them, one behind the other; a part without rows says so."""
    rows = list(rows)
    parts = [_run(rows), _starts(rows), _turns(rows, LONG, None)]
    kinds = dict.fromkeys(row["kind"] for row in _played(rows, AGENTS))
    parts += [_turns(rows, AGENTS, kind) for kind in kinds] or ["No recorded conversations."]
    parts += [_together(rows), _failures(rows)]
    return "\n\n".join(part for part in parts if part)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which such a share lies: one that was measured."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    made = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*made, *(f"| {' | '.join(line)} |" for line in lines)])


def _played(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row.get("part") == part and "total_ms" in row]


def _sides(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["side"] for row in rows))


def _run(rows: Sequence[Row]) -> str:
    for row in rows:
        if row.get("part") == "run":
            return ", ".join(f"{key} {value}" for key, value in row.items() if key != "part")
    return ""


def _starts(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row.get("part") == "start" and "seconds" in row]
    lines = [(row["side"], f"{row['seconds']:.0f}") for row in found]
    return _table(("side", "ready after (s)"), lines) if lines else "No side was ready."


def _equal(rows: Sequence[Row]) -> str:
    return f"{sum(row['equal'] for row in rows)} of {len(rows)}"


def _against_stock(rows: Sequence[Row], side: str, key: str) -> str:
    """The ratio of the medians, over turns that both played, and the median of the ratios."""
    played = {
        name: {(row["talk"], row["turn"]): row[key] for row in rows if row["side"] == name}
        for name in (STOCK, side)
    }
    both = [turn for turn in played[STOCK] if turn in played[side]]
    if not both or side == STOCK:
        return NONE
    stock, ours = ([played[name][turn] for turn in both] for name in (STOCK, side))
    pairs = median(a / b for a, b in zip(stock, ours, strict=True))
    return f"{median(stock) / median(ours):.2f}, {pairs:.2f}"


def _turns(rows: Sequence[Row], part: str, kind: str | None) -> str:
    """Turns that were played alone; of the first of a talk only the prefill is said."""
    played = [row for row in _played(rows, part) if kind is None or row["kind"] == kind]
    if not played:
        return f"No turns: {part}."
    later = [row for row in played if row["turn"]]
    lines = []
    for side in _sides(played):
        own = [row for row in later if row["side"] == side]
        first = [row for row in played if row["side"] == side and not row["turn"]]
        line = [side, str(len(own))]
        line.append(f"{median(row['ttft_ms'] for row in first):.0f}" if first else NONE)
        if not own:
            lines.append([*line, *[NONE] * 6, _equal(first), *_drafts(rows, part, side, kind)])
            continue
        for key in ("ttft_ms", "total_ms"):
            line.append(f"{median(row[key] for row in own):.1f}")
            line.append(_against_stock(later, side, key))
        line.append(f"{median(row['prompt'] for row in own):.0f}")
        line.append(f"{median(row['prompt'] - row['cached'] for row in own):.0f}")
        lines.append([*line, _equal([*first, *own]), *_drafts(rows, part, side, kind)])
    heads = ["side", "later turns", "first turn TTFT (ms)", "TTFT, median (ms)", "stock / side"]
    heads += ["whole turn, median (ms)", "stock / side", "prompt", "of it computed", "as recorded"]
    heads += ["tokens a step", "drafted for each accepted"] if part == AGENTS else []
    title = "One long session" if part == LONG else f"One session at a time: {kind}"
    return f"{title} (stock / side: of the medians, median of the pairs)\n\n{_table(heads, lines)}"


def _drafts(rows: Sequence[Row], part: str, side: str, kind: str | None) -> list[str]:
    if part != AGENTS:
        return []
    found = [
        row
        for row in rows
        if row.get("part") == "drafts" and row["side"] == side and row["kind"] == kind
    ]
    made, drafted, right = (
        sum(row[key] for row in found) for key in ("generated", "drafted", "accepted")
    )
    if not made:
        return [NONE, NONE]
    return [f"{made / (made - right):.2f}", f"{drafted / right:.2f}" if right else NONE]


def _together(rows: Sequence[Row]) -> str:
    played = _played(rows, TOGETHER)
    if not played:
        return f"No turns: {TOGETHER}."
    walls = {row["side"]: row for row in rows if row.get("part") == "wall"}
    lines = []
    for side in _sides(played):
        own = [row for row in played if row["side"] == side]
        gaps = [gap for row in own for gap in row.get("gaps_ms", [])]
        wall = walls.get(side)
        per_second = wall["made"] / wall["seconds"] if wall else 0.0
        line = [side, str(wall["sessions"] if wall else NONE), str(len(own))]
        line.append("yes" if wall and wall["is_whole"] else "no")
        line.append(f"{per_second:.0f}" if wall else NONE)
        for values in ([row["ttft_ms"] for row in own], gaps):
            line += [f"{quantile(values, q):.1f}" if values else NONE for q in (0.5, 0.95)]
        spent = sum(row["total_ms"] - row["ttft_ms"] for row in own)
        behind = sum(row["made"] - 1 for row in own)
        line.append(f"{spent / behind:.2f}" if behind else NONE)
        lines.append([*line, _equal(own)])
    heads = ["side", "sessions", "turns", "all of them", "tokens/s", "TTFT p50 (ms)", "p95"]
    heads += ["between two events p50 (ms)", "p95", "ms a token", "as recorded"]
    return f"At once, one side at a time\n\n{_table(heads, lines)}"


def _failures(rows: Sequence[Row]) -> str:
    found = [row for row in rows if "failed" in row]
    return "\n".join(
        f"FAILED {row['part']}, {row['side']}: {' '.join(row['failed'].split())[:MOST_CHARS]}"
        for row in found
    )
