# SPDX-License-Identifier: Apache-2.0
"""Drafts from sessions change nothing but the number of steps, whatever a request asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from drafted import DRAWN, KINDS, NOT_BESIDE_HEADS
from forked import with_vllm
from local_models import ROOT, TINY

pytestmark = pytest.mark.e2e

LOGPROB_TOLERANCE = 1e-3


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
        if name.split(" ")[0] not in NOT_BESIDE_HEADS:
            for field in ("token_ids", "text", "finish_reason"):
                assert beside_head["answers"][name][field] == answer[field], name
    assert beside_head["accepted"] > 50


@pytest.mark.parametrize("kind", ["logprobs", "all logprobs", "logprob_token_ids"])
def test_logprobs_are_those_without_drafts(
    both: tuple[dict[str, Any], dict[str, Any]], kind: str
) -> None:
    stock, drafted = (each["answers"][f"{kind} 2"]["logprobs"] for each in both)
    assert len(stock) == len(drafted) > 0
    for ours, theirs in zip(drafted, stock, strict=True):
        assert [token for _, token in ours] == [token for _, token in theirs]
        for (one, _), (other, _) in zip(ours, theirs, strict=True):
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


def test_scored_tokens_beside_drafting_turns_are_answered_as_without_drafts(
    both: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """vLLM's rejection sampler ends the engine at `logprob_token_ids`."""
    stock, drafted = both
    assert drafted["scored"] == stock["scored"]


ELSEWHERE = {
    "prompt_logprob_token_ids prompt_logprob_start": "only on model runner V2",
    "thinking_token_budget": "wants a reasoning parser",
    "trace_decode_token_ids": "only on model runner V2; refused beside drafts",
    "watermarking": "only with a watermark, with which nothing is drafted by default",
    "skip_reading_prefix_cache routed_experts_prompt_start": "is about the prompt",
    "flat_logprobs detokenize skip_special_tokens spaces_between_special_tokens output_kind "
    "include_stop_str_in_output stream_interval skip_clone output_text_buffer_length": "is about "
    "the text, or how it is sent",
    "stop": "asked with a text of the first answer",
}


def test_every_parameter_of_a_request_is_asked() -> None:
    """A new release of vLLM may bring one that ends the engine beside drafts."""
    from vllm import SamplingParams

    always = {"temperature", "seed", "ignore_eos", "max_tokens"}
    asked = {name for kind in [*KINDS.values(), *DRAWN.values()] for name in kind}
    known = asked | always | {name for names in ELSEWHERE for name in names.split(" ")}
    fields = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert fields == known
