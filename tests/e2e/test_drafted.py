# SPDX-License-Identifier: Apache-2.0
"""Drafts from sessions change nothing but the number of steps, whatever a request asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forked import with_vllm
from local_models import ROOT, TINY

pytestmark = pytest.mark.e2e

LOGPROB_TOLERANCE = 1e-3
REFUSED_BESIDE_HEADS = ("min_p", "logit_bias")
"""By vLLM, whoever drafts."""


def ask(folder: Path, *options: str) -> dict[str, Any]:
    out = folder / "out.json"
    program = ROOT / "tests" / "e2e" / "drafted.py"
    with_vllm().run(program, "--model", TINY, "--out", out, *options)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    if not (TINY / "config.json").exists():
        pytest.skip("the tiny model is not built: run `make model`")
    folder = tmp_path_factory.mktemp("drafted")
    return ask(folder), ask(folder, "--drafts", "sessions")


@pytest.fixture(scope="module")
def beside_head(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ask(tmp_path_factory.mktemp("drafted"), "--drafts", "beside-head")


def test_greedy_answers_are_equal_under_every_parameter(
    both: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    stock, drafted = both
    for name, answer in stock["answers"].items():
        for field in ("token_ids", "text", "finish_reason"):
            assert drafted["answers"][name][field] == answer[field], name
    accepted = drafted["accepted"]
    print(f"{len(stock['answers'])} answers, {accepted} drafted tokens accepted")
    assert accepted > 50


def test_beside_a_head_too(
    both: tuple[dict[str, Any], dict[str, Any]], beside_head: dict[str, Any]
) -> None:
    for name, answer in both[0]["answers"].items():
        if name.split(" ")[0] not in REFUSED_BESIDE_HEADS:
            for field in ("token_ids", "text", "finish_reason"):
                assert beside_head["answers"][name][field] == answer[field], name
    assert beside_head["accepted"] > 50


def test_logprobs_are_those_without_drafts(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    stock, drafted = (each["answers"]["logprobs 2"]["logprobs"] for each in both)
    assert len(stock) == len(drafted) > 0
    for ours, theirs in zip(drafted, stock, strict=True):
        assert [token for token, _ in ours] == [token for token, _ in theirs]
        for (_, one), (_, other) in zip(ours, theirs, strict=True):
            assert abs(one - other) < LOGPROB_TOLERANCE


def test_greedy_turns_beside_drawn_ones_are_answered_as_without_drafts(
    both: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    stock, drafted = both
    assert drafted["mixed"] == stock["mixed"]


def test_drawn_turns_are_those_without_drafts(
    both: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    stock, drafted = (each["drawn"] for each in both)
    assert drafted == stock
    assert len({tuple(answer) for answer in stock.values()}) > 3, "the parameters matter"


def test_a_logit_bias_beside_drafting_turns_is_answered_as_without_drafts(
    both: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    stock, drafted = both
    assert drafted["biased"] == stock["biased"]
    assert len({tuple(answer) for answer in stock["biased"]}) > 2, "the bias changes the answers"
    assert drafted["accepted_beside_bias"] > 20
