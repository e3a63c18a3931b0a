# SPDX-License-Identifier: Apache-2.0
"""The kernels' benchmark with sides that fail in every way: the others have their times."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu.limited import append_row, read_rows, run_limited
from benchmarks.kernels import bench_kernels, sides, steps
from benchmarks.kernels.report import table

ROOT = Path(__file__).parents[2]
FAULTS = ["is wrong", "forgets the cache", "ends the process", "ends it later", "hangs"]


def test_a_fault_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "START_S", 20)
    monkeypatch.setattr(bench_kernels, "PREPARE_S", 5)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{Path(__file__).parent}")
    comparison = bench_kernels.Comparison(tmp_path, {}, "sides_with_faults")
    first, second = steps.of_a_cpu()
    try:
        until = time.monotonic() + 120
        rows = comparison.measure(first, ["mma 64", *FAULTS], 2, until)
        again = comparison.measure(second, ["ends the process", "mma 64"], 2, until)
    finally:
        comparison.close()
    right, wrong, forgets, ends, later, hangs = rows
    assert right["us"] > 0
    assert right["error"] < 4e-3
    assert len(right["samples"]) == 2
    assert wrong["wrong"]
    assert wrong["error"] > 4e-3
    assert "cache" in forgets["failed"]
    assert "exit status 7" in ends["failed"]
    assert "exit status 8" in later["failed"]
    assert hangs["failed"] == "no answer in time"
    assert not any("us" in row for row in rows[1:])
    assert "exit status 7" in again[0]["failed"]  # another process was asked
    assert again[1]["us"] > 0
    lines = table(rows).splitlines()
    assert "WRONG" in lines[3]
    assert "no answer in time" in lines[7]


def test_the_steps_of_a_run_have_a_name_and_a_floor_of_their_own() -> None:
    regimes = steps.all_regimes()
    by_name = {regime.name: regime for regime in regimes}
    assert all(by_name[regime.name] == regime for regime in regimes)
    assert all(1e-7 < regime.floor_s() < 1e-2 for regime in regimes)
    for regime, names in bench_kernels.chosen_steps("agents,goals", {}):
        assert names[0] == sides.FA3
        assert len(set(names)) == len(names)
        assert regime.name in by_name


def test_sides_of_a_library_that_was_not_built_are_left_out() -> None:
    fans = {"fan16": Path("x.so")}
    without, named = (
        {n for _, names in bench_kernels.chosen_steps("sweeps", each) for n in names}
        for each in ({}, fans)
    )
    assert named - without == {"mma 64 with fan16"}


def test_rows_survive_a_cut(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    append_row(file, {"a": 1})
    append_row(file, {"b": 2})
    file.write_text(file.read_text()[:-4])
    assert list(read_rows(file)) == [{"a": 1}]
    assert list(read_rows(tmp_path / "none")) == []


def test_a_process_over_its_limit_ends_with_all_that_it_started(tmp_path: Path) -> None:
    child = "import subprocess, time; subprocess.Popen(['sleep', '61.5'])"
    child += "; print('hi', flush=True); time.sleep(60)"
    problem = run_limited([sys.executable, "-c", child], 2, tmp_path / "log")
    assert problem == "ended by its limit of 2 s: hi"
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert "sleep 61.5" not in listed.stdout
    assert run_limited(["true"], 5, tmp_path / "log") == ""
    env = {"SAID": "five"}
    said = run_limited(["sh", "-c", "echo $SAID; exit 5"], 5, tmp_path / "log", env)
    assert said == "exit status 5: five"
    assert os.environ.get("SAID") is None
