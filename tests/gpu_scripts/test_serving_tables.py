# SPDX-License-Identifier: Apache-2.0
"""Tables of recorded rows, whole and with parts missing; and how many layers fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import serving
from benchmarks.gpu.limited import append_row, read_rows
from benchmarks.gpu.serving_plays import AGENTS, LONG, TOGETHER
from benchmarks.gpu.serving_sides import (
    ALL_SIDES,
    ATTENTION,
    PLUGIN,
    PLUGIN_DRAFTS,
    STOCK,
    STOCK_DRAFTS,
    fitting_layers,
    side_arguments,
)
from benchmarks.gpu.serving_tables import quantile, tables

RECORDED = Path(serving.__file__).with_name("recorded") / "serving_cpu.jsonl"
Row = dict[str, Any]


@pytest.fixture
def rows() -> list[Row]:
    return list(read_rows(RECORDED))


def lines_of(text: str, title: str) -> dict[str, list[str]]:
    """The cells of a table, by side."""
    _, _, rest = text.partition(title)
    made = {}
    for line in rest.split("\n\n")[1].splitlines()[2:]:
        side, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        made[side] = cells
    return made


def test_every_part_has_its_table(rows: list[Row]) -> None:
    text = tables(rows)
    long = lines_of(text, "One long session")
    assert list(long) == [STOCK, PLUGIN]
    assert long[STOCK][3] == "-"
    assert float(long[PLUGIN][7]) <= float(long[STOCK][7])  # tokens computed
    service = lines_of(text, "One session at a time: taubench")
    assert set(service) == set(ALL_SIDES)
    assert float(service[PLUGIN_DRAFTS][-2]) > float(service[STOCK][-2]) == 1.0
    assert set(lines_of(text, "At once")) == set(ALL_SIDES)
    assert "FAILED" not in text


def test_answers_are_those_that_were_recorded(rows: list[Row]) -> None:
    assert all(row["equal"] for row in rows if "equal" in row)


@pytest.mark.parametrize("left_out", [STOCK, PLUGIN, PLUGIN_DRAFTS])
def test_a_side_may_be_missing(rows: list[Row], left_out: str) -> None:
    text = tables(row for row in rows if row.get("side") != left_out)
    for title in ("One session at a time: taubench", "At once"):
        assert set(lines_of(text, title)) == set(ALL_SIDES) - {left_out}
    if left_out == STOCK:
        assert lines_of(text, "At once")[PLUGIN]
        assert lines_of(text, "One long session")[PLUGIN][3] == "-"


def test_a_failed_side_is_named_with_what_it_said(rows: list[Row]) -> None:
    said = "ended with exit status 1: Traceback\n  it was like this" + "x" * 5000
    rows.append({"part": AGENTS, "side": ATTENTION, "failed": said})
    last = tables(rows).splitlines()[-1]
    assert last.startswith(f"FAILED {AGENTS}, {ATTENTION}: ended with exit status 1: Traceback it")
    assert len(last) < 250


@pytest.mark.parametrize("part", [LONG, AGENTS, TOGETHER])
def test_a_part_may_be_missing(rows: list[Row], part: str) -> None:
    text = tables(row for row in rows if row["part"] != part)
    assert ("No recorded conversations." if part == AGENTS else f"No turns: {part}.") in text


def test_nothing_and_cuts_are_no_error(tmp_path: Path, rows: list[Row]) -> None:
    assert "No side was ready." in tables([])
    turn = {"part": TOGETHER, "side": STOCK, "kind": "taubench", "talk": "a"}
    assert "No turns" in tables([{**turn, "turn": 0, "cut": True}])
    file = tmp_path / "rows.jsonl"
    for row in rows:
        append_row(file, row)
    file.write_text(file.read_text()[:-9])
    assert tables(read_rows(file)) == tables(rows[:-1])


def test_only_first_turns_are_shown_as_such(rows: list[Row]) -> None:
    text = tables(row for row in rows if row["part"] == LONG and row["turn"] == 0)
    assert lines_of(text, "One long session")[STOCK][2] == "-"


def test_the_program_prints_them_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rows: list[Row]
) -> None:
    monkeypatch.setattr("sys.argv", ["serving", "--tables", str(RECORDED)])
    assert serving.main() == 0
    assert capsys.readouterr().out.strip() == tables(rows).strip()


def test_quantiles_are_measured_values() -> None:
    assert [quantile([3, 1, 2, 4], share) for share in (0.0, 0.5, 0.95, 1.0)] == [1, 3, 4, 4]


def test_layers_are_as_many_as_fit() -> None:
    h100, h200 = int(79.1 * 2**30), int(139.8 * 2**30)
    two, five = (fitting_layers("llama-8b", h100, sides, 110_000) for sides in (2, 5))
    assert two == 32
    assert 8 <= five <= 12
    assert 20 <= fitting_layers("llama-8b", h200, 5, 110_000) <= 26
    with pytest.raises(ValueError, match="do not fit"):
        fitting_layers("llama-8b", h100, 16, 110_000)


def test_sides_differ_in_what_they_are_named_for() -> None:
    assert side_arguments(STOCK, is_on_gpu=True) == []
    for side in ALL_SIDES:
        arguments = " ".join(side_arguments(side, is_on_gpu=True))
        assert ("--plugin stateful" in arguments) == side.startswith(PLUGIN)
        assert ("ngram_gpu" in arguments) == (side in (STOCK_DRAFTS, PLUGIN_DRAFTS))
        assert ("--stateful-attention on" in arguments) == (side == ATTENTION)
