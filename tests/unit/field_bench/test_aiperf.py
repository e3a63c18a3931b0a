# SPDX-License-Identifier: Apache-2.0
"""The sessions, the grid and the tables of the benchmark with AIPerf."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.field import aiperf
from benchmarks.field.aiperf_report import (
    CACHED,
    EXPORT,
    FINISHED,
    PREEMPTED,
    PROMPT,
    BadExportError,
    Run,
    ratio_table,
    read_run,
    run_table,
    totals,
)
from benchmarks.field.aiperf_sessions import (
    BEGIN_TOKENS,
    REPOSITORY,
    TURN_TOKENS,
    BadSessionsError,
    cache_blocks,
    kept_tokens,
    longest_tokens,
    offline_tokenizer,
    read,
    recipe,
)
from benchmarks.serving.servers import PLUGIN, STOCK

ROWS = [
    {"session_id": "a", "input_length": 1000, "output_length": 30, "hash_ids": [0, 1]},
    {"session_id": "a", "input_length": 100, "output_length": 40, "hash_ids": [9]},
    {"session_id": "b", "input_length": 612, "output_length": 50, "hash_ids": [0, 2]},
]
TEMPLATES = 2 * BEGIN_TOKENS + 3 * TURN_TOKENS


def dataset(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "dataset.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_shared_blocks_are_counted_once(tmp_path: Path) -> None:
    sessions = read(dataset(tmp_path, ROWS))
    assert [len(session) for session in sessions] == [2, 1]
    assert kept_tokens(sessions) == 512 + 488 + 100 + 100 + 120 + TEMPLATES
    assert longest_tokens(sessions) == 1170 + BEGIN_TOKENS + 2 * TURN_TOKENS


def test_a_cache_holds_at_least_the_longest_session(tmp_path: Path) -> None:
    sessions = read(dataset(tmp_path, ROWS))
    assert cache_blocks(sessions, 1.0, 128) == -(-kept_tokens(sessions) // 128) + 4
    assert cache_blocks(sessions, 0.01, 128) == -(-longest_tokens(sessions) // 128) + 2


@pytest.mark.parametrize("rows", [[], [{"session_id": "a"}], [ROWS[0] | {"hash_ids": None}]])
def test_another_dataset_is_an_error(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(BadSessionsError):
        read(dataset(tmp_path, rows))


def test_lengths_are_aiperf_s_own_times_the_scale() -> None:
    quarter = recipe(0.25, 4, 64)
    assert quarter["cache"]["layer1_tokens"] == 8000
    assert quarter["max_prompt_tokens"] == 50_000
    assert quarter["generation_length"] == {"mean": 125, "median": 75, "max": 64}
    assert quarter["turns"]["min"] <= quarter["turns"]["median"] < quarter["turns"]["mean"]


def test_the_tokenizer_lies_where_a_hub_would_have_put_it(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    hub = offline_tokenizer(model, tmp_path / "home")
    repository = hub / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    revision = (repository / "refs" / "main").read_text()
    assert (repository / "snapshots" / revision / "tokenizer.json").is_file()


def test_sides_take_turns_and_no_server_gets_a_seed_twice() -> None:
    grid = aiperf.cells(aiperf.parse(["--tool", "aiperf"]))
    assert len(grid) == 12
    for share in (0.4, 1.0):
        seeds = [cell.seed for cell in grid if cell.share == share]
        assert len(set(seeds)) == len(seeds) == 6
    first = {(cell.share, cell.concurrency): set[str]() for cell in grid}
    for cell in grid:
        first[cell.share, cell.concurrency].add(cell.sides[0])
    assert all(begun == {STOCK, PLUGIN} for begun in first.values())


def exported(**more: Any) -> dict[str, Any]:
    names = ("time_to_first_token", "inter_token_latency", "request_latency")
    counts = ("request_count", "benchmark_duration", "request_throughput")
    counts += ("output_token_throughput", "total_usage_completion_tokens")
    times = {name: {"unit": "ms", "p50": 1.0, "p90": 2.0, "p99": 3.0} for name in names}
    numbers = {name: {"unit": "-", "avg": 10.0} for name in counts}
    return {"was_cancelled": False, "is_complete": True, **times, **numbers, **more}


def found(folder: Path, **more: Any) -> Run:
    (folder / EXPORT).write_text(json.dumps(exported(**more)))
    grown = {PROMPT: 100.0, CACHED: 60.0, PREEMPTED: 0.0, FINISHED: 10.0}
    return read_run(folder, grown, side=STOCK, share=1.0, concurrency=8, number=0)


def test_a_run_has_the_tool_s_times_and_the_server_s_tokens(tmp_path: Path) -> None:
    run = found(tmp_path, error_request_count={"unit": "requests", "avg": 2.0})
    assert (run.requests, run.errors) == (10, 2)
    assert (run.ttft_ms_p50, run.ttft_ms_p90, run.ttft_ms_p99) == (1.0, 2.0, 3.0)
    assert (run.prompt_tokens, run.cached_tokens, run.computed_tokens) == (100, 60, 40)
    assert found(tmp_path).errors == 0


@pytest.mark.parametrize(
    "more", [{"was_cancelled": True}, {"is_complete": False}, {"request_latency": None}]
)
def test_a_run_that_did_not_finish_is_an_error(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(BadExportError):
        found(tmp_path, **more)


def test_totals_are_over_all_labels() -> None:
    figures = {f'{name}{{reason="{reason}"}}': 2.0 for reason in "ab" for name in (PROMPT, CACHED)}
    figures |= {FINISHED: 1.0, PREEMPTED: 0.0, "vllm:other_total": 5.0}
    assert totals(figures) == {PROMPT: 4.0, CACHED: 4.0, FINISHED: 1.0, PREEMPTED: 0.0}
    with pytest.raises(BadExportError, match=PREEMPTED):
        totals({PROMPT: 1.0, CACHED: 1.0, FINISHED: 1.0})


def test_a_ratio_above_one_is_better_with_the_plugin(tmp_path: Path) -> None:
    stock = found(tmp_path)
    plugin = dataclasses.replace(
        stock, side=PLUGIN, requests_per_s=15.0, ttft_ms_p50=0.5, cached_tokens=80
    )
    lines = ratio_table([stock, plugin]).splitlines()
    names, values = ([cell.strip() for cell in line.split("|")] for line in (lines[0], lines[2]))
    row = dict(zip(names, values, strict=True))
    assert (row["requests/s"], row["TTFT p50"], row["tokens computed"]) == ("1.50", "2.00", "2.00")
    assert row["TTFT p90"] == "1.00"
    assert len(run_table([plugin, stock]).splitlines()) == 4
