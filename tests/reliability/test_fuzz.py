# SPDX-License-Identifier: Apache-2.0
"""Broken and odd requests get from the plugin what stock vLLM answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from benchmarks.reliability.fuzz import differences
from benchmarks.reliability.fuzz_answers import Case
from benchmarks.reliability.fuzz_cases import handwritten
from benchmarks.reliability.fuzz_mutate import mutated
from benchmarks.reliability.fuzz_sides import MODEL, Sides, running_sides

pytestmark = pytest.mark.e2e

SEED, NUM_RANDOM = 1, 40
EVERY = 4
"""Of the table's cases; `python -m benchmarks.reliability.fuzz` plays all of them."""


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    if not (MODEL / "config.json").exists():
        pytest.skip("tiny-llama is not built: run `make model`")
    with running_sides(tmp_path_factory.mktemp("fuzz")) as running:
        yield running
        running.check_alive()
        assert running.faults_in_log() == []


@pytest.mark.parametrize(
    "cases",
    [handwritten()[::EVERY], mutated(SEED, NUM_RANDOM)],
    ids=["handwritten", "random"],
)
def test_both_sides_answer_the_same(sides: Sides, cases: list[Case]) -> None:
    assert [found.as_json() for found in differences(sides, cases)] == []
