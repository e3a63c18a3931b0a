# SPDX-License-Identifier: Apache-2.0
"""The rows of the demo, the table of one row a turn, the summary and the JSON file."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.demo.turns import Measured

STOCK, PLUGIN = "stock", "plugin"
MISSING = "-"


@dataclass(frozen=True)
class Row:
    """One turn of one agent on every server that was asked."""

    agent: str
    turn: int
    tool: str
    num_new_tokens: int
    sides: dict[str, Measured]
    is_valid_call: bool

    @property
    def num_prompt_tokens(self) -> int:
        return next(iter(self.sides.values())).num_prompt_tokens

    @property
    def same_answer(self) -> bool | None:
        """Whether both servers said the same; None when only one was asked."""
        if len(self.sides) < 2:
            return None
        return self.sides[STOCK].answer.says_the_same(self.sides[PLUGIN].answer)


@dataclass(frozen=True)
class Column:
    """A heading in two lines, its width, and how a row fills it."""

    head: tuple[str, str]
    width: int
    text: Callable[[Row], str]
    is_text: bool = False


def _side(side: str, write: Callable[[Measured], str]) -> Callable[[Row], str]:
    return lambda row: write(row.sides[side]) if side in row.sides else MISSING


def _cached(measured: Measured) -> str:
    return str(measured.num_cached_tokens)


def _ttft(measured: Measured) -> str:
    return f"{measured.ttft_ms:.0f}"


def _total(measured: Measured) -> str:
    return f"{measured.total_s:.2f}"


def _same(row: Row) -> str:
    return {True: "yes", False: "NO", None: MISSING}[row.same_answer]


TOOL_COLUMN = Column(("", "tool called"), 18, lambda row: row.tool, is_text=True)
COLUMNS = (
    Column(("", "agent"), 14, lambda row: row.agent, is_text=True),
    Column(("", "turn"), 4, lambda row: str(row.turn)),
    TOOL_COLUMN,
    Column(("prompt", "tokens"), 6, lambda row: str(row.num_prompt_tokens)),
    Column(("new", "tokens"), 6, lambda row: str(row.num_new_tokens)),
    Column(("reused", "stock"), 6, _side(STOCK, _cached)),
    Column(("reused", "plugin"), 6, _side(PLUGIN, _cached)),
    Column(("TTFT ms", "stock"), 7, _side(STOCK, _ttft)),
    Column(("TTFT ms", "plugin"), 7, _side(PLUGIN, _ttft)),
    Column(("total s", "stock"), 7, _side(STOCK, _total)),
    Column(("total s", "plugin"), 7, _side(PLUGIN, _total)),
    Column(("same", "answer"), 6, _same),
)


def make_table(rows: Sequence[Row], note: str, width: int) -> Table:
    """The table for a terminal; the note below it says what happens now."""
    is_wide = width >= sum(column.width + 1 for column in COLUMNS)
    columns = [column for column in COLUMNS if is_wide or column is not TOOL_COLUMN]
    table = Table(
        caption=note, caption_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False
    )
    for column in columns:
        head = "\n".join(column.head)
        if column.is_text:
            table.add_column(head)
        else:
            table.add_column(head, justify="right", no_wrap=True, min_width=column.width)
    for row in rows:
        cells = [column.text(row) for column in columns]
        table.add_row(*cells, style="yellow" if row.same_answer is False else None)
    return table


def plain_head() -> str:
    """The heading of the table as two lines of text."""
    lines = [_plain([column.head[line] for column in COLUMNS]) for line in (0, 1)]
    return "\n".join([*lines, "-" * len(lines[1])])


def plain_row(row: Row) -> str:
    """One row of the table as a line of text."""
    return _plain([column.text(row) for column in COLUMNS])


def _plain(cells: Sequence[str]) -> str:
    padded = [
        cell.ljust(column.width) if column.is_text else cell.rjust(column.width)
        for cell, column in zip(cells, COLUMNS, strict=True)
    ]
    return "  ".join(padded).rstrip()


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Medians of each side and their ratios (stock over plugin), first turns kept apart."""
    sides = {side: _medians(rows, side) for side in (STOCK, PLUGIN) if side in rows[0].sides}
    answers = [row.same_answer for row in rows]
    summary: dict[str, Any] = {
        "turns": len(rows),
        "different_answers": answers.count(False),
        "valid_calls": sum(row.is_valid_call for row in rows),
        "sides": sides,
    }
    if len(sides) == 2:
        stock, plugin = sides[STOCK], sides[PLUGIN]
        summary["ratios"] = {
            key: stock[key] / plugin[key] for key in stock if stock[key] and plugin[key]
        }
    return summary


def _medians(rows: Sequence[Row], side: str) -> dict[str, float]:
    first = [row.sides[side] for row in rows if row.turn == 1]
    later = [row.sides[side] for row in rows if row.turn > 1]
    every = first + later
    values: dict[str, float] = {"first_turn_ttft_ms": statistics.median(m.ttft_ms for m in first)}
    if later:
        values["later_turn_ttft_ms"] = statistics.median(m.ttft_ms for m in later)
        values["later_turn_first_chunk_ms"] = statistics.median(m.first_chunk_ms for m in later)
        values["later_turn_total_s"] = statistics.median(m.total_s for m in later)
        values["later_turn_tokens_computed"] = statistics.median(
            m.num_computed_tokens for m in later
        )
    values["all_turns_total_s"] = sum(m.total_s for m in every)
    values["all_turns_tokens_computed"] = sum(m.num_computed_tokens for m in every)
    return values


LINES = (
    ("first_turn_ttft_ms", "TTFT, first turns, median (ms)", ".0f"),
    ("later_turn_ttft_ms", "TTFT, later turns, median (ms)", ".0f"),
    ("later_turn_first_chunk_ms", "first chunk (role), later turns, median (ms)", ".0f"),
    ("later_turn_total_s", "whole turn, later turns, median (s)", ".2f"),
    ("later_turn_tokens_computed", "prompt tokens computed, later turns, median", ".0f"),
    ("all_turns_total_s", "all turns together (s)", ".1f"),
    ("all_turns_tokens_computed", "prompt tokens computed, all turns", ".0f"),
)


def summary_text(summary: dict[str, Any], about: dict[str, str]) -> str:
    """The summary as it is printed at the end."""
    sides, ratios = summary["sides"], summary.get("ratios", {})
    text = [f"{'':<45}" + "".join(f"{side:>10}" for side in sides) + ("  ratio" if ratios else "")]
    for key, label, form in LINES:
        values = [side.get(key) for side in sides.values()]
        if any(value is None for value in values):
            continue
        cells = "".join(f"{format(value, form):>10}" for value in values)
        ratio = f"{ratios[key]:>6.2f}x" if key in ratios else ""
        text.append(f"{label:<45}{cells}{ratio}")
    text.append("")
    text.append(f"tool calls true to their schema: {summary['valid_calls']} of {summary['turns']}")
    if ratios:
        text.append(f"turns with different answers: {summary['different_answers']}")
    text.extend(f"{key}: {value}" for key, value in about.items())
    return "\n".join(text)


def save_json(
    path: Path, rows: Sequence[Row], summary: dict[str, Any], about: dict[str, str]
) -> None:
    """Everything that was measured, answers included."""
    turns = [asdict(row) | {"same_answer": row.same_answer} for row in rows]
    document = {"about": about, "summary": summary, "turns": turns}
    path.write_text(json.dumps(document, indent=1) + "\n")
