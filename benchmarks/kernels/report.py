# SPDX-License-Identifier: Apache-2.0
"""The table of `bench_kernels`, from the rows of its file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

HEAD = ["| step | side | us | of floor | FA3 / this | error |", "|---|---|---|---|---|---|"]
MOST_REASON = 90  # letters of it in the table; the file has it whole


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Time, share of the floor, how many times faster than FA3, and the error against float64."""
    found = list(rows)
    fa3 = {row["step"]: row["us"] for row in found if row.get("side") == "FA3" and "us" in row}
    lines = list(HEAD)
    for row in found:
        if "about" in row:
            lines.insert(0, "\n".join(f"{name}: {value}" for name, value in row["about"].items()))
            lines.insert(1, "")
        elif "skipped" in row:
            lines.append(f"| {row['step']} | | {row['skipped']} | | | |")
        else:
            lines.append(_line(row, fa3.get(row["step"])))
    return "\n".join(lines)


def _line(row: dict[str, Any], fa3: float | None) -> str:
    start = f"| {row['step']} | {row['side']} | "
    error = f"{row['error']:.1e}" if "error" in row else ""
    if "us" not in row:
        reason = "WRONG" if row.get("wrong") else row.get("failed", "no time")
        reason = " ".join(str(reason).split()).replace("|", "/")
        return f"{start}{reason[:MOST_REASON]} | | | {error} |"
    ratio = f"{fa3 / row['us']:.2f}" if fa3 else ""
    return f"{start}{row['us']:.1f} | {row['of_floor']:.0%} | {ratio} | {error} |"
