# SPDX-License-Identifier: Apache-2.0
"""Percentiles, tables in Markdown, and results as JSON with one sample a line."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any


def percentile(values: Sequence[float], share: float) -> float:
    """Between the values, as a straight line; NaN where there is none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as the README has them, its columns aligned."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    lines = [head, ["-" * width for width in widths], *rows]
    cells = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def ratio(stock: float, plugin: float) -> str:
    """How many times less the plugin has."""
    return f"{stock / plugin:.2f}" if plugin else "-"


def save(path: Path, document: dict[str, Any], samples: Sequence[Any]) -> None:
    """Write the document with its samples, which are dataclasses, at its end."""
    rows = [asdict(sample) for sample in samples]
    keys = list(rows[0]) if rows else []
    lines = ",\n".join("  " + json.dumps([_short(row[key]) for key in keys]) for row in rows)
    head = json.dumps(_rounded(document) | {"sample_keys": keys}, indent=1).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "samples": [\n{lines}\n ]\n}}\n')


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return _short(value)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3) if value == value else None
    return value
