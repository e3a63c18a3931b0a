# SPDX-License-Identifier: Apache-2.0
"""What the timers' records say about one request."""

from pathlib import Path

import pytest

from benchmarks.serving import stages
from benchmarks.serving.stages import Record, Window

# One prompt step and one decode step; the answer has two tokens, the second one is computed
# while the first is on its way.
RECORDS = [
    Record("tokenize", 0.5, 0.9),  # of an earlier request
    Record("tokenize", 1.000, 1.010),
    Record("tokenizer itself", 1.002, 1.008),
    Record("tokenizer itself", 1.003, 1.004),
    Record("schedule", 1.020, 1.021),
    Record("execute_model", 1.022, 1.042),
    Record("attention forward", 1.025, 1.030),
    Record("attention forward", 1.031, 1.034),
    Record("update_from_output", 1.043, 1.044),
    Record("schedule", 1.045, 1.046),
    Record("process_outputs", 1.045, 1.055),
    Record("execute_model", 1.047, 1.057),
    Record("attention forward", 1.048, 1.056),
    Record("update_from_output", 1.058, 1.059),
    Record("free (behind the answer)", 1.0585, 1.0590),
    Record("execute_model", 1.0595, 1.0598),  # without attention: the request has ended
]
WINDOW = Window(sent_s=0.999, first_s=1.060, end_s=1.062, num_answer_tokens=2)


def test_only_the_prompts_step_counts() -> None:
    times = stages.stage_times(RECORDS, WINDOW)
    assert times["execute_model"] == pytest.approx(20)
    assert times["attention forward"] == pytest.approx(8)
    assert times["schedule"] == pytest.approx(1)
    assert times["update_from_output"] == pytest.approx(1)
    assert times["process_outputs"] == pytest.approx(10)


def test_a_call_inside_another_of_the_same_stage_counts_once() -> None:
    times = stages.stage_times(RECORDS, WINDOW)
    assert times["tokenize"] == pytest.approx(10)
    assert times["tokenizer itself"] == pytest.approx(6)


def test_what_runs_behind_the_answer_is_not_part_of_the_first_token() -> None:
    times = stages.stage_times(RECORDS, WINDOW)
    assert times["free (behind the answer)"] == pytest.approx(0.5)
    # tokenize 10, schedule 1, execute_model 20, update_from_output 1, process_outputs 10
    assert times[stages.OUTSIDE] == pytest.approx(61 - 42)


def test_two_prompt_steps() -> None:
    window = WINDOW._replace(num_answer_tokens=1)
    times = stages.stage_times(RECORDS, window)
    assert times["execute_model"] == pytest.approx(30)
    assert times["attention forward"] == pytest.approx(16)


def test_without_records_all_time_is_outside() -> None:
    times = stages.stage_times([], WINDOW)
    assert times.pop(stages.OUTSIDE) == pytest.approx(61)
    assert not any(times.values())


def test_longest_block_of_a_request() -> None:
    blocks = [(0.5, 0.9), (1.01, 1.013), (1.03, 1.037), (1.07, 1.2)]
    records = [Record(stages.LOOP_BLOCKED, *block) for block in blocks]
    assert stages.longest(stages.LOOP_BLOCKED, records, WINDOW) == pytest.approx(7)
    assert stages.longest(stages.LOOP_WORK, records, WINDOW) == 0


def test_records_of_all_processes_are_put_in_order(tmp_path: Path) -> None:
    (tmp_path / "api-1.times").write_text("tokenize\t2.0\t2.5\nmissing\tgone:there\n")
    (tmp_path / "core-2.times").write_text("schedule\t1.0\t1.5\nsched")
    records, missing = stages.read_records(tmp_path)
    assert records == [Record("schedule", 1.0, 1.5), Record("tokenize", 2.0, 2.5)]
    assert missing == ["gone:there"]


def test_every_part_names_a_stage() -> None:
    names = {stage.name for stage in stages.STAGES}
    assert len(names) == len(stages.STAGES)
    assert all(stage.inside in names for stage in stages.STAGES if stage.inside)
    assert [stages.depth(stage) for stage in stages.STAGES[2:6]] == [0, 1, 2, 2]
