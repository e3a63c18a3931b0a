# SPDX-License-Identifier: Apache-2.0
"""Rows, summary, files and the command line of the demo."""

import json
import socket
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.demo.__main__ import parse
from benchmarks.demo.plot import save_plot
from benchmarks.demo.report import (
    Row,
    differences_text,
    explained_text,
    save_json,
    summarize,
    summary_text,
)
from benchmarks.demo.servers import ServerOptions, serve_command
from benchmarks.demo.sides import ARGUMENTS, DEFAULT, EXACT, FAST, STOCK
from benchmarks.demo.table import make_table, plain_head, plain_row
from benchmarks.demo.turns import Answer, Measured, ToolCall
from benchmarks.ports import HOST, free_port, is_free

ABOUT = dict.fromkeys(("model", "dtype", "vllm", "commit", "machine", "date"), "test")


def measured(ttft_ms: float, num_cached: int, text: str = "yes", drafts: int = 0) -> Measured:
    answer = Answer(text, [ToolCall("call-1", "query_db", "{}")])
    turn = Measured(answer, ttft_ms / 2, ttft_ms, ttft_ms / 500, 1000, num_cached, 40)
    turn.num_accepted_drafts = drafts
    turn.is_valid_call = True
    return turn


def row(turn: int, stock: Measured, exact: Measured, fast: Measured) -> Row:
    return Row("Data Analyst", turn, {STOCK: stock, EXACT: exact, FAST: fast})


@pytest.fixture
def rows() -> list[Row]:
    made = [
        row(1, measured(900, 0), measured(900, 0), measured(900, 0)),
        row(2, measured(200, 640), measured(100, 720), measured(80, 800, drafts=20)),
        row(3, measured(400, 640), measured(100, 720), measured(90, 800, text="no", drafts=30)),
    ]
    made[1].sides[FAST].explanation = ["Resumed: of 1,000 tokens, 800 reused, 200 computed."]
    return made


def test_summary_keeps_first_turns_apart(rows: list[Row]) -> None:
    summary = summarize(rows)
    assert summary["same_answers"] == {EXACT: 3, FAST: 2}
    assert summary["sides"][STOCK]["first_turn_total_s"] == pytest.approx(1.8)
    assert summary["sides"][STOCK]["ttft_ms"] == 300
    assert summary["sides"][EXACT]["all_tokens_computed"] == 1560
    assert summary["sides"][FAST]["accepted_drafts"] == 25
    assert summary["ratios"][EXACT]["ttft_ms"] == pytest.approx(3.0)
    assert "accepted_drafts" not in summary["ratios"][FAST]
    assert "fast: 2 of 3 answers are stock's" in summary_text(summary, ABOUT)


def test_one_side_has_no_ratio_and_no_comparison() -> None:
    rows = [Row("Data Analyst", 1, {EXACT: measured(900, 0)})]
    summary = summarize(rows)
    assert "ratios" not in summary
    assert rows[0].same_answer(EXACT) is None
    assert "answers are stock's" not in summary_text(summary, ABOUT)
    assert explained_text(rows) == ""


def test_other_answers_are_shown_beside_those_of_stock(rows: list[Row]) -> None:
    assert differences_text(rows) == (
        "Other answers than stock's, from other token ids or results:\n"
        "Data Analyst, turn 3:\n  stock  yes query_db({})\n  fast   no query_db({})"
    )


def test_white_space_in_arguments_changes_no_value(rows: list[Row]) -> None:
    rows[1].sides[FAST].answer.tool_calls[0].arguments = "{\n}"
    assert rows[1].same_answer(FAST) is False
    assert "fast: 1 of 3 answers are stock's, and 1 more but for white space" in summary_text(
        summarize(rows), ABOUT
    )
    assert "turn 2" not in differences_text(rows)
    rows[1].sides[FAST].answer.tool_calls[0].arguments = "{"
    assert not rows[1].same_values(FAST)


def test_the_explained_turn_is_one_that_the_plugin_explains(rows: list[Row]) -> None:
    text = explained_text(rows[:2])
    assert "Data Analyst, turn 2" in text
    assert "stock: of 1,000 tokens, 640 reused, 360 computed; stock vLLM does not say why." in text
    assert "    Resumed: of 1,000 tokens, 800 reused, 200 computed." in text


def test_plain_lines_are_aligned(rows: list[Row]) -> None:
    head = plain_head(DEFAULT).splitlines()
    line = plain_row(rows[0])
    assert line.index("query_db") == head[1].index("tool called")
    assert len(line) <= len(head[-1])
    assert plain_row(rows[2]).split()[-2:] == ["yes", "NO"]


@pytest.mark.parametrize(("width", "num_tools", "num_ttft"), [(150, 3, 3), (118, 0, 3), (80, 0, 0)])
def test_a_narrow_table_leaves_columns_out(
    rows: list[Row], width: int, num_tools: int, num_ttft: int
) -> None:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(make_table(DEFAULT, rows, "now", width))
    assert capture.get().count("query_db") == num_tools
    assert capture.get().count("TTFT ms") == num_ttft
    assert capture.get().count("1000") == 6


def test_files_are_written(rows: list[Row], tmp_path: Path) -> None:
    save_plot(tmp_path / "demo.png", rows, ABOUT)
    save_json(tmp_path / "demo.json", rows, summarize(rows), ABOUT)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    turns = json.loads((tmp_path / "demo.json").read_text())["turns"]
    assert [turn["same_answer"][FAST] for turn in turns] == [True, True, False]
    assert turns[0]["sides"][EXACT]["answer"]["text"] == "yes"


def test_servers_differ_only_in_the_extra_arguments() -> None:
    options = ServerOptions(Path("model"), "float32", 1, 128)
    stock, *others = (serve_command(options, 1, extra) for extra in ARGUMENTS.values())
    for side, command in zip(list(ARGUMENTS)[1:], others, strict=True):
        assert command == [*stock, *ARGUMENTS[side]]


def test_a_free_port_is_for_a_server_and_nobody_else() -> None:
    port = free_port()
    assert is_free(port)
    with socket.socket() as client, pytest.raises(OSError, match="in use"):
        client.bind((HOST, port))
    with socket.create_server(("", port)), socket.create_connection((HOST, port)):
        assert not is_free(port)
    assert is_free(port)


def test_command_line() -> None:
    assert parse([]).sides == list(DEFAULT)
    assert parse(["--sides", "stock,ngram", "--turns", "2"]).turns == 2
    for words in (["--turns", "6"], ["--sides", "stock,none"]):
        with pytest.raises(SystemExit):
            parse(words)
