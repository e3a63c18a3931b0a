# SPDX-License-Identifier: Apache-2.0
"""Rows, tables, files and the command line of the benchmark; and what its client reads."""

import json
from pathlib import Path

import pytest

from benchmarks.serving import report
from benchmarks.serving.bench_host_path import num_turns, parse
from benchmarks.serving.client import RequestFailedError, encode_body, parse_stream
from benchmarks.serving.plot import save_plot
from benchmarks.serving.report import MEASURED, PROBED, Sample
from benchmarks.serving.servers import PLUGIN, STOCK, environment, serve_command
from benchmarks.serving.stages import ATTENTION

ABOUT = {"vllm": "0", "commit": "none", "machine": "test", "date": "today"}


def sample(
    side: str, turn: int, ttft_ms: float, context: int = 1000, kind: str = MEASURED, text: str = "a"
) -> Sample:
    times = (ttft_ms, ttft_ms, 2 * ttft_ms)
    made = Sample(side, 1, context, turn, kind, context + turn, context, *times, text)
    if kind == PROBED:
        made.block_ms, made.work_ms = ttft_ms / 10, ttft_ms / 20
    else:
        made.stages_ms, made.host_ms = {ATTENTION: 2.0, "tokenize": ttft_ms / 2}, ttft_ms - 2
    return made


@pytest.fixture
def samples() -> list[Sample]:
    made = []
    for context in (1000, 90000, 120000, 180000):
        for turn, stock_ms in enumerate((10.0, 20.0, 60.0)):
            made.append(sample(STOCK, turn, stock_ms, context))
            made.append(sample(PLUGIN, turn, stock_ms / 2, context, text="ab"[turn == 2]))
        made += [sample(side, 3, 50.0, context, PROBED) for side in (STOCK, PLUGIN)]
    return made


def test_a_row_holds_medians_and_equal_answers(samples: list[Sample]) -> None:
    row = report.make_rows(samples)[0]
    assert (row.context, row.num_turns, row.num_prompt_tokens) == (1000, 3, 1001)
    assert row.ttft_ms == {STOCK: 20.0, PLUGIN: 10.0}
    assert row.ttft_p90_ms[STOCK] == pytest.approx(52)
    assert row.ratio == 2.0
    assert row.host_ms == {STOCK: 18.0, PLUGIN: 8.0}
    assert row.block_ms == {STOCK: 5.0, PLUGIN: 5.0}
    assert row.num_equal_answers == 3  # of four, the probed one among them


def test_without_stages_there_is_no_host_time(samples: list[Sample]) -> None:
    for each in samples:
        each.host_ms, each.block_ms = None, None
    rows = report.make_rows(samples)
    assert rows[0].host_ms == {}
    assert "20.0 / 52.0" in report.ttft_table(rows, 4)


def test_stages_are_shown_for_the_smallest_and_for_one_near_106k(samples: list[Sample]) -> None:
    rows = report.make_rows(samples)
    assert report.stage_contexts(rows) == [(1, 1000), (1, 120000)]
    assert report.stage_medians(samples, 1, 1000)["tokenize"] == {STOCK: 10.0, PLUGIN: 5.0}
    table = report.stage_table(samples, 1, 1000).splitlines()
    assert next(line for line in table if "tokenize " in line).split() == [
        *("api", "tokenize", "10.00", "5.00")
    ]


def test_blocks_below_the_resolution_are_not_told_apart(samples: list[Sample]) -> None:
    samples[-1].block_ms = 1.5
    table = report.loop_table(report.make_rows(samples)).splitlines()
    assert " ".join(table[-1].split()) == "1 180000 5.0 / 5.0 < 2 / < 2 2.5 / 2.5 2.5 / 2.5"
    assert " ".join(table[-2].split()) == "1 120000 5.0 / 5.0 5.0 / 5.0 2.5 / 2.5 2.5 / 2.5"


def test_files(samples: list[Sample], tmp_path: Path) -> None:
    rows = report.make_rows(samples)
    report.save_json(tmp_path / "run.json", ABOUT, rows, samples)
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["rows"][0]["ratio"] == 2.0
    assert len(found["samples"]) == len(samples)
    assert len(found["samples"][0]) == len(found["sample_keys"])
    assert len(found["samples"][0][-1]) == len(found["stages"])
    save_plot(tmp_path / "run.png", rows, ABOUT)
    assert 0 < (tmp_path / "run.png").stat().st_size < 80_000


def test_p90() -> None:
    assert report.p90([3.0]) == 3.0
    assert report.p90([float(value) for value in range(11)]) == 9.0


def test_command_line() -> None:
    args = parse(["--quick"])
    assert (args.contexts, args.messages, args.turns) == ([2000, 20000], [1], 4)
    assert num_turns(args) == 9
    assert parse(["--no-stages"]).probe_turns == 0
    with pytest.raises(SystemExit):
        parse(["--contexts", "1000,262000"])


def test_only_the_plugin_differs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stock, plugin = (serve_command(tmp_path, 1, side) for side in (STOCK, PLUGIN))
    assert plugin == [*stock, "--plugin", "stateful"]
    monkeypatch.setenv("VLLM_STATEFUL", "1")
    assert "VLLM_STATEFUL" not in environment(STOCK)


def chunked(*events: str) -> bytes:
    parts = [f"data: {event}\n\n".encode() for event in events]
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n" + body + b"0\r\n\r\n"


def test_a_stream_is_put_together() -> None:
    choices = [[{"delta": {"role": "assistant", "content": ""}}], [{"delta": {"content": "né"}}]]
    events = [json.dumps({"choices": choice}, ensure_ascii=False) for choice in choices]
    usage = {"prompt_tokens": 3, "completion_tokens": 1}
    last = json.dumps({"choices": [], "usage": usage})
    assert parse_stream(chunked(*events, last, "[DONE]")) == ("né", usage)
    with pytest.raises(RequestFailedError):
        parse_stream(chunked(*events, "[DONE]"))
    with pytest.raises(RequestFailedError):
        parse_stream(chunked('{"error": "no"}'))


def test_a_body_is_greedy_and_streamed() -> None:
    body = json.loads(encode_body("m", [{"role": "user", "content": "é"}], 4))
    assert (body["temperature"], body["stream"], body["max_tokens"]) == (0, True, 4)
