# SPDX-License-Identifier: Apache-2.0
"""Rows, summary, files and the command line of the demo."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.demo.__main__ import parse
from benchmarks.demo.plot import save_plot
from benchmarks.demo.report import (
    PLUGIN,
    STOCK,
    Row,
    make_table,
    plain_head,
    plain_row,
    save_json,
    summarize,
    summary_text,
)
from benchmarks.demo.servers import ServerOptions, free_port, is_free, serve_command
from benchmarks.demo.turns import Answer, Measured

ABOUT = dict.fromkeys(("model", "dtype", "vllm", "commit", "machine", "date"), "test")


def measured(ttft_ms: float, num_cached: int, text: str = "yes") -> Measured:
    return Measured(Answer(text), ttft_ms / 2, ttft_ms, ttft_ms / 500, 1000, num_cached, 40)


def row(turn: int, stock: Measured, plugin: Measured | None = None) -> Row:
    sides = {STOCK: stock} | ({PLUGIN: plugin} if plugin else {})
    return Row("Data Analyst", turn, "query_db", 250, sides, is_valid_call=True)


@pytest.fixture
def rows() -> list[Row]:
    return [
        row(1, measured(900, 0), measured(900, 0)),
        row(2, measured(200, 640), measured(100, 720)),
        row(3, measured(400, 640), measured(100, 720, text="no")),
    ]


def test_summary_keeps_first_turns_apart(rows: list[Row]) -> None:
    summary = summarize(rows)
    assert summary["different_answers"] == 1
    assert summary["sides"][STOCK]["first_turn_ttft_ms"] == 900
    assert summary["sides"][STOCK]["later_turn_ttft_ms"] == 300
    assert summary["sides"][PLUGIN]["all_turns_tokens_computed"] == 1560
    assert summary["ratios"]["later_turn_ttft_ms"] == pytest.approx(3.0)


def test_one_side_has_no_ratio_and_no_comparison() -> None:
    rows = [row(1, measured(900, 0))]
    summary = summarize(rows)
    assert "ratios" not in summary
    assert rows[0].same_answer is None
    assert "different answers" not in summary_text(summary, ABOUT)


def test_plain_lines_are_aligned(rows: list[Row]) -> None:
    head = plain_head().splitlines()
    line = plain_row(rows[0])
    assert line.index("query_db") == head[1].index("tool called")
    assert len(line) <= len(head[-1])
    assert plain_row(rows[2]).endswith("NO")


@pytest.mark.parametrize(("width", "num_tools"), [(120, 3), (80, 0)])
def test_table_leaves_the_tool_out_where_the_terminal_is_narrow(
    rows: list[Row], width: int, num_tools: int
) -> None:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(make_table(rows, "now", width))
    assert capture.get().count("query_db") == num_tools
    assert capture.get().count("1000") == 3


def test_files_are_written(rows: list[Row], tmp_path: Path) -> None:
    save_plot(tmp_path / "demo.png", rows, ABOUT)
    save_json(tmp_path / "demo.json", rows, summarize(rows), ABOUT)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    turns = json.loads((tmp_path / "demo.json").read_text())["turns"]
    assert [turn["same_answer"] for turn in turns] == [True, True, False]
    assert turns[0]["sides"]["plugin"]["answer"]["text"] == "yes"


def test_servers_differ_only_in_the_extra_arguments() -> None:
    options = ServerOptions(Path("model"), "float32", 1, 128)
    stock, plugin = (serve_command(options, 1, extra) for extra in ([], ["--plugin", "stateful"]))
    assert plugin == [*stock, "--plugin", "stateful"]


def test_free_port_is_free() -> None:
    assert is_free(free_port())


def test_command_line() -> None:
    assert parse([]).plugin_args == "--plugin stateful"
    assert parse(["--only", "stock", "--turns", "2"]).turns == 2
    with pytest.raises(SystemExit):
        parse(["--turns", "6"])
