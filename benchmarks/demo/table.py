# SPDX-License-Identifier: Apache-2.0
"""The table of one row a turn, for a terminal and as plain lines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rich import box
from rich.table import Table

from benchmarks.demo.report import Row
from benchmarks.demo.sides import STOCK
from benchmarks.demo.turns import Measured

SAME = {True: "yes", False: "NO", None: "-"}


@dataclass(frozen=True)
class Column:
    """A heading in two lines, its width, how a row fills it, and when it is left out first."""

    head: tuple[str, str]
    width: int
    text: Callable[[Row], str]
    is_text: bool = False
    left_out: int = 0
    """Where the terminal is narrow, columns with the largest number are left out first."""


def columns(sides: Sequence[str]) -> list[Column]:
    """The columns for these servers."""
    found = [
        Column(("", "agent"), 14, lambda row: row.agent, is_text=True),
        Column(("", "turn"), 4, lambda row: str(row.turn)),
        Column(("", "tool called"), 16, lambda row: row.tool, is_text=True, left_out=2),
        Column(("prompt", "tokens"), 6, lambda row: str(row.first.num_prompt_tokens)),
    ]
    found += _each("compute", 7, sides, lambda turn: str(turn.num_computed_tokens))
    found += _each("TTFT ms", 7, sides, lambda turn: f"{turn.ttft_ms:.0f}", left_out=1)
    found += _each("total s", 7, sides, lambda turn: f"{turn.total_s:.2f}")
    found += _each("drafts", 6, sides[-1:], lambda turn: str(turn.num_accepted_drafts))
    return found + [
        Column(("same", side), 5, partial(_same, side=side)) for side in sides if side != STOCK
    ]


def _each(
    head: str,
    width: int,
    sides: Sequence[str],
    write: Callable[[Measured], str],
    left_out: int = 0,
) -> list[Column]:
    def text(row: Row, side: str) -> str:
        return write(row.sides[side])

    return [
        Column((head, side), width, partial(text, side=side), left_out=left_out) for side in sides
    ]


def _same(row: Row, side: str) -> str:
    return SAME[row.same_answer(side)]


def make_table(sides: Sequence[str], rows: Sequence[Row], note: str, width: int) -> Table:
    """The table for a terminal; the note below it says what happens now."""
    shown = columns(sides)
    for number in (2, 1):
        if width < sum(column.width + 1 for column in shown):
            shown = [column for column in shown if column.left_out != number]
    table = Table(
        caption=note, caption_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False
    )
    for column in shown:
        head = "\n".join(column.head)
        if column.is_text:
            table.add_column(head)
        else:
            table.add_column(head, justify="right", no_wrap=True, min_width=column.width)
    for row in rows:
        table.add_row(*(column.text(row) for column in shown))
    return table


def plain_head(sides: Sequence[str]) -> str:
    """The heading of the table as two lines of text."""
    shown = columns(sides)
    lines = [_plain(shown, [column.head[line] for column in shown]) for line in (0, 1)]
    return "\n".join([*lines, "-" * len(lines[1])])


def plain_row(row: Row) -> str:
    """One row of the table as a line of text."""
    shown = columns(list(row.sides))
    return _plain(shown, [column.text(row) for column in shown])


def _plain(shown: Sequence[Column], cells: Sequence[str]) -> str:
    padded = [
        cell.ljust(column.width) if column.is_text else cell.rjust(column.width)
        for cell, column in zip(cells, shown, strict=True)
    ]
    return "  ".join(padded).rstrip()
