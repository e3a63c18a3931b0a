# SPDX-License-Identifier: Apache-2.0
"""Drafts from sessions change nothing but the number of steps, whatever a request asks for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from local_models import ROOT, TINY

pytestmark = pytest.mark.e2e

LOGPROB_TOLERANCE = 1e-3
CRITICAL = 26.1
"""Of the chi-square distribution with 8 degrees of freedom: exceeded once in a thousand times."""


def ask(folder: Path, *options: str) -> dict[str, Any]:
    out = folder / "out.json"
    command = [sys.executable, str(ROOT / "tests" / "e2e" / "drafted.py"), "--model", str(TINY)]
    done = subprocess.run(
        [*command, "--out", str(out), *options],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    if not (TINY / "config.json").exists():
        pytest.skip("the tiny model is not built: run `make model`")
    folder = tmp_path_factory.mktemp("drafted")
    return ask(folder), ask(folder, "--drafts")


def test_greedy_answers_are_equal_under_every_parameter(
    both: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    stock, drafted = both
    for name, answer in stock["answers"].items():
        for field in ("token_ids", "text", "finish_reason"):
            assert drafted["answers"][name][field] == answer[field], name
    accepted, _ = drafted["accepted"]
    print(f"{len(stock['answers'])} answers, {accepted} drafted tokens accepted")
    assert accepted > 50


def test_logprobs_are_those_without_drafts(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    stock, drafted = (each["answers"]["logprobs 2"]["logprobs"] for each in both)
    assert len(stock) == len(drafted) > 0
    for ours, theirs in zip(drafted, stock, strict=True):
        assert [token for token, _ in ours] == [token for token, _ in theirs]
        for (_, one), (_, other) in zip(ours, theirs, strict=True):
            assert abs(one - other) < LOGPROB_TOLERANCE


@pytest.mark.parametrize("side", [0, 1])
def test_what_is_sampled_has_the_model_s_own_distribution(
    both: tuple[dict[str, Any], dict[str, Any]], side: int
) -> None:
    """Chi-square over the first two tokens; with drafts the second was drafted, mostly wrong."""
    counts, chances = both[side]["sampled"], both[0]["chances"]
    assert counts.keys() <= chances.keys()
    total = sum(counts.values())
    statistic = sum(
        (counts.get(pair, 0) - total * chance) ** 2 / (total * chance)
        for pair, chance in chances.items()
    )
    _, accepted = both[side]["accepted"]
    print(f"chi-square {statistic:.1f}, {accepted} drafted tokens accepted in {total} answers")
    assert statistic < CRITICAL
    assert side == 0 or accepted > 200
