# SPDX-License-Identifier: Apache-2.0
"""The rows of the demo, the summary, the explained turn and the JSON file."""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.demo.sides import STOCK
from benchmarks.demo.turns import Measured


@dataclass(frozen=True)
class Row:
    """One turn of one agent on every server that was asked."""

    agent: str
    turn: int
    sides: dict[str, Measured]

    @property
    def first(self) -> Measured:
        """The turn on the first server."""
        return next(iter(self.sides.values()))

    @property
    def tool(self) -> str:
        """What the first server's answer calls."""
        return ", ".join(call.name for call in self.first.answer.tool_calls) or "(text)"

    @property
    def short_name(self) -> str:
        """Initials of the agent, and the turn."""
        return "".join(word[0] for word in self.agent.split()) + f" {self.turn}"

    def same_answer(self, side: str) -> bool | None:
        """Whether this side said the same as stock; None when there is nothing to compare."""
        if side == STOCK or STOCK not in self.sides:
            return None
        return self.sides[STOCK].answer.says_the_same(self.sides[side].answer)

    def same_values(self, side: str) -> bool:
        """Whether this side said the same as stock, but for white space in the arguments."""
        return self.sides[STOCK].answer.means_the_same(self.sides[side].answer)


Value = Callable[[Measured], float]

MEDIANS: tuple[tuple[str, str, str, Value], ...] = (
    ("ttft_ms", "time to first token, median (ms)", ".0f", lambda m: m.ttft_ms),
    ("total_s", "whole turn, median (s)", ".2f", lambda m: m.total_s),
    (
        "tokens_computed",
        "prompt tokens computed, median",
        ".0f",
        lambda m: m.num_computed_tokens,
    ),
    ("new_tokens", "prompt tokens that are new, median", ".0f", lambda m: m.num_new_tokens),
    ("answer_tokens", "answer tokens, median", ".0f", lambda m: m.num_output_tokens),
    (
        "accepted_drafts",
        "of these, accepted drafts, median",
        ".0f",
        lambda m: m.num_accepted_drafts,
    ),
)
"""Key, label, format and value of what is told of turns after the first."""

SUMS: tuple[tuple[str, str, str, Value], ...] = (
    ("all_total_s", "all turns together (s)", ".1f", lambda m: m.total_s),
    (
        "all_tokens_computed",
        "prompt tokens computed, all turns",
        ".0f",
        lambda m: m.num_computed_tokens,
    ),
    ("all_answer_tokens", "answer tokens, all turns", ".0f", lambda m: m.num_output_tokens),
    ("all_accepted_drafts", "accepted drafts, all turns", ".0f", lambda m: m.num_accepted_drafts),
)
FIRST_TURNS = "first_turn_total_s"


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Medians and sums of each side, and their ratios to stock (stock divided by the side)."""
    names = list(rows[0].sides)
    sides = {side: _values(rows, side) for side in names}
    summary: dict[str, Any] = {
        "turns": len(rows),
        "valid_calls": {side: sum(row.sides[side].is_valid_call for row in rows) for side in names},
        "sides": sides,
    }
    others = [side for side in names if side != STOCK]
    if STOCK in sides and others:
        summary["same_answers"] = {
            side: sum(row.same_answer(side) is True for row in rows) for side in others
        }
        summary["same_values"] = {
            side: sum(row.same_values(side) for row in rows) for side in others
        }
        summary["ratios"] = {side: _ratios(sides[STOCK], sides[side]) for side in others}
    return summary


def _values(rows: Sequence[Row], side: str) -> dict[str, float]:
    first = [row.sides[side] for row in rows if row.turn == 1]
    later = [row.sides[side] for row in rows if row.turn > 1]
    values = {FIRST_TURNS: statistics.median(turn.total_s for turn in first)}
    if later:
        values |= {key: statistics.median(map(value, later)) for key, _, _, value in MEDIANS}
    return values | {key: sum(map(value, first + later)) for key, _, _, value in SUMS}


def _ratios(stock: dict[str, float], side: dict[str, float]) -> dict[str, float]:
    return {key: stock[key] / side[key] for key in stock if stock[key] and side[key]}


def summary_text(summary: dict[str, Any], about: dict[str, str]) -> str:
    """The summary as it is printed at the end."""
    ratios = summary.get("ratios", {})
    heads = [*summary["sides"], *(f"{STOCK}/{side}" for side in ratios)]
    lines = [f"{'':<42}" + "".join(f"{head:>13}" for head in heads)]
    lines.append("turns after the first")
    lines += _lines(summary, ratios, MEDIANS)
    lines.append("")
    first = (FIRST_TURNS, "first turns, whole turn, median (s)", ".2f", lambda m: m.total_s)
    lines += _lines(summary, ratios, (first, *SUMS))
    lines.append("")
    lines += _answers(summary)
    lines += [f"{key}: {value}" for key, value in about.items()]
    return "\n".join(lines)


def _lines(
    summary: dict[str, Any],
    ratios: dict[str, dict[str, float]],
    entries: Sequence[tuple[str, str, str, Value]],
) -> Iterator[str]:
    for key, label, form, _ in entries:
        values = [side.get(key) for side in summary["sides"].values()]
        if None in values:
            continue
        cells = "".join(f"{format(value, form):>13}" for value in values)
        factors = (f"{side[key]:.2f}x" if key in side else "" for side in ratios.values())
        yield f"{label:<42}{cells}{''.join(f'{factor:>13}' for factor in factors)}".rstrip()


def _answers(summary: dict[str, Any]) -> Iterator[str]:
    turns = summary["turns"]
    for side, number in summary["valid_calls"].items():
        yield f"{side}: {number} of {turns} answers call a tool, true to its schema"
    for side, number in summary.get("same_answers", {}).items():
        more = summary["same_values"][side] - number
        yield f"{side}: {number} of {turns} answers are stock's" + (
            f", and {more} more but for white space" if more else ""
        )


def differences_text(rows: Sequence[Row]) -> str:
    """The answers that are not stock's, beside those of stock; empty when all are."""
    lines = []
    for row in rows:
        for side, turn in row.sides.items():
            if row.same_answer(side) is False and not row.same_values(side):
                lines += [
                    f"{row.agent}, turn {row.turn}:",
                    f"  {STOCK:<6} {row.sides[STOCK].answer.written()}",
                    f"  {side:<6} {turn.answer.written()}",
                ]
    if not lines:
        return ""
    return "\n".join(["Other answers than stock's, from other token ids or results:", *lines])


def explained_text(rows: Sequence[Row]) -> str:
    """One turn explained: the first later one, in which all sides have the same conversation."""
    row = next((row for row in rows if row.turn > 1), None)
    if row is None:
        return ""
    lines = [f"Why one turn computed what it computed: {row.agent}, turn {row.turn}"]
    for side, turn in row.sides.items():
        if turn.explanation:
            lines.append(f"  {side} (vllm-stateful explain URL {turn.answer_id})")
            lines += [f"    {sentence}" for sentence in turn.explanation]
        else:
            lines.append(
                f"  {side}: of {turn.num_prompt_tokens:,} tokens, {turn.num_cached_tokens:,} "
                f"reused, {turn.num_computed_tokens:,} computed; stock vLLM does not say why."
            )
    return "\n".join(lines)


def save_json(
    path: Path, rows: Sequence[Row], summary: dict[str, Any], about: dict[str, str]
) -> None:
    """Everything that was measured, answers included."""
    turns = [
        asdict(row)
        | {"same_answer": {side: row.same_answer(side) for side in row.sides if side != STOCK}}
        for row in rows
    ]
    document = {"about": about, "summary": summary, "turns": turns}
    path.write_text(json.dumps(document, indent=1) + "\n")
