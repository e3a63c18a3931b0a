# SPDX-License-Identifier: Apache-2.0
"""Tables, results and command line of the pressure benchmark."""

import json
import math
from pathlib import Path

import pytest

from benchmarks.serving import bench_pressure
from benchmarks.serving import pressure_report as report
from benchmarks.serving.pressure_load import ONE_SHOT, TOOL_TURN, Load, OneShot
from benchmarks.serving.pressure_play import Sample, busy_s, num_planned
from benchmarks.serving.pressure_report import Run
from benchmarks.serving.servers import PLUGIN, SIDES, STOCK, Settings, environment, serve_command
from benchmarks.serving.tables import markdown, percentile, save

LOAD = Load(60.0, (), tuple(OneShot(f"o{number}", 1.0, "text") for number in range(4)), {})


def sample(side: str, sent_s: float, ttft_ms: float, kind: str = TOOL_TURN) -> Sample:
    made = Sample(side, 1, kind, f"{kind}-{sent_s}", 1, sent_s, ttft_ms, 2 * ttft_ms)
    made.num_prompt_tokens = made.num_planned_tokens = 100
    made.num_cached_tokens = 60 if side == STOCK else 90
    return made


@pytest.fixture
def runs() -> list[Run]:
    made = []
    for side, factor in ((STOCK, 2.0), (PLUGIN, 1.0)):
        samples = [sample(side, at_s, factor * ms) for at_s, ms in ((0, 100), (1, 200), (9, 600))]
        samples.append(sample(side, 10, 50, ONE_SHOT))
        made.append(Run(side, 1, 4, samples, {'vllm:num_preemptions_total{engine="0"}': 3.0}))
    return made


def test_percentiles() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(value) for value in range(11)], 0.9) == 9.0
    assert percentile([1.0, 2.0], 0.99) == pytest.approx(1.99)
    assert percentile([5.0], 0.99) == 5.0
    assert math.isnan(percentile([], 0.5))


def test_rows_by_kind_and_for_all(runs: list[Run]) -> None:
    rows = {row.kind: row for row in report.make_rows(runs)}
    assert list(rows) == [TOOL_TURN, report.RETURNING, ONE_SHOT, report.ALL]
    tool = rows[TOOL_TURN]
    assert tool.num == {STOCK: 3, PLUGIN: 3}
    assert [tool.ttft_ms[side]["median"] for side in SIDES] == [400, 200]
    assert [tool.total_ms[side]["median"] for side in SIDES] == [800, 400]
    assert tool.prefilled_tokens == {STOCK: 120, PLUGIN: 30}
    assert rows[report.ALL].prefilled_tokens == {STOCK: 160, PLUGIN: 40}
    line = report.prefill_table([tool]).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [TOOL_TURN, "3", "300", "120", "30", "4.00"]
    assert "0.40 / 1.04 / 1.18" in report.latency_table([tool], "ttft_ms")


def test_a_failed_request_is_shown_and_not_counted(runs: list[Run]) -> None:
    runs[1].samples[0].error = "RequestFailedError: no"
    assert report.make_rows(runs)[0].num == {STOCK: 3, PLUGIN: 2}
    assert runs[1].num_failed == 1
    (line,) = report.faults(runs)
    assert "plugin, round 1, tool turn-0, request 1: RequestFailedError: no" in line
    cells = report.round_table(runs, [LOAD]).splitlines()[-1].split("|")
    assert [cell.strip() for cell in cells[-4:-1]] == ["0 / 1", "0 / 0", "0 / 0"]


def test_requests_behind_a_failed_one_are_shown_as_not_sent(runs: list[Run]) -> None:
    del runs[0].samples[1]
    runs[0].samples[0].is_equal = False
    cells = report.round_table(runs, [LOAD]).splitlines()[-1].split("|")
    assert [cell.strip() for cell in cells[-3:-1]] == ["1 / 0", "1 / 0"]
    assert num_planned(LOAD) == 4


def test_a_prompt_of_another_length_is_said(runs: list[Run]) -> None:
    runs[0].samples[0].num_planned_tokens = 99
    assert report.faults(runs) == ["stock, round 1: 1 prompts of another length"]


def test_busy_is_the_union_of_all_requests(runs: list[Run]) -> None:
    # 0 to 0.2, 1 to 1.4, 9 to 10.2, 10 to 10.1
    assert busy_s(runs[1].samples) == pytest.approx(0.2 + 0.4 + 1.2)
    assert runs[1].busy_share == pytest.approx(1.8 / 10.2)
    assert runs[1].num_preempted == 3


def test_counters_are_told_as_differences() -> None:
    before = {'vllm_stateful_turns_total{outcome="cold"}': 5.0, "vllm_stateful_sessions": 7.0}
    after = {
        'vllm_stateful_turns_total{outcome="cold"}': 9.0,
        'vllm_stateful_turns_total{outcome="resumed"}': 2.0,
        "vllm_stateful_turns_created": 1e9,
        "vllm_stateful_sessions": 3.0,
        "vllm:other_total": 1.0,
    }
    assert report.grown(before, after) == {
        'vllm_stateful_turns_total{outcome="cold"}': 4.0,
        'vllm_stateful_turns_total{outcome="resumed"}': 2.0,
        "vllm_stateful_sessions": 3.0,
    }


def test_results(runs: list[Run], tmp_path: Path) -> None:
    document = report.document({"date": "today"}, [LOAD], {"tokens": 64}, runs)
    samples = [each for run in runs for each in run.samples]
    save(tmp_path / "new" / "run.json", document, samples)
    found = json.loads((tmp_path / "new" / "run.json").read_text())
    assert found["about"] == {"date": "today"}
    assert [run["prefilled_tokens"] for run in found["runs"]] == [160, 40]
    assert len(found["samples"]) == 8
    assert len(found["samples"][0]) == len(found["sample_keys"])


def test_markdown_is_aligned() -> None:
    lines = markdown(["a", "long head"], [["much longer", "1"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].startswith("| -----------")


def test_command_line() -> None:
    args = bench_pressure.parse(["--capacity", "natural"])
    assert args.capacity is None
    assert bench_pressure.parse(["--quick"]).rounds == 1
    with pytest.raises(SystemExit):
        bench_pressure.parse(["--rounds", "0"])


def test_a_cache_below_one_request_is_refused() -> None:
    args = bench_pressure.parse([])
    with pytest.raises(ValueError, match="too small"):
        bench_pressure.sizes(args, [LOAD])
    assert bench_pressure.sizes(bench_pressure.parse(["--capacity", "natural"]), [LOAD])[1] is None


def test_settings_change_both_sides_alike(tmp_path: Path) -> None:
    settings = Settings("m", 4096, ("--block-size", "32"), 4, {"A": "1"})
    stock, plugin = (serve_command(tmp_path, 1, side, settings) for side in SIDES)
    assert plugin == [*stock, "--plugin", "stateful"]
    assert stock[-2:] == ["--block-size", "32"]
    assert "--max-num-batched-tokens" not in stock
    for side in SIDES:
        found = environment(side, settings)
        assert (found["A"], found["VLLM_CPU_KVCACHE_SPACE"]) == ("1", "4")
