# SPDX-License-Identifier: Apache-2.0
"""Pinned answers in model runner V2: with the plugin's drafts, with vLLM's, beside free answers."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from forked import Forks

ROOT = Path(__file__).parents[2]
V2 = ROOT / "tests" / "model_runner_v2"
SIDES = {"ngram": {}, "drafts": {"VLLM_STATEFUL": "1", "VLLM_STATEFUL_STRICT": "1"}}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pinned")
    forks = Forks("on_host", "vllm.entrypoints.llm", path=(V2,))

    def play(side: str) -> dict[str, Any]:
        (folder / side).mkdir()
        program = Path(__file__).with_name("pinned_engine.py")
        forks.run(program, folder / side, side, PYTHONPATH=str(ROOT), **SIDES[side])
        return dict(json.loads((folder / side / "answers.json").read_text()))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SIDES, pool.map(play, SIDES), strict=True))


@pytest.mark.parametrize("side", SIDES)
def test_pinned_requests_say_it_and_the_others_what_they_would(
    side: str, played: dict[str, dict[str, Any]]
) -> None:
    found = played[side]
    said = [tokens for *tokens, _cached in found["said"]]
    before, after = ([tokens for *tokens, _ in found[when]] for when in ("before", "after"))
    assert said[:-1] == found["pinned"][:-1]
    assert said[-1] == before[-1]
    assert after == before  # rows are used again


def test_what_is_pinned_can_be_drafted(played: dict[str, dict[str, Any]]) -> None:
    for found in played.values():
        assert sum(found["steps"]) > 100
    assert len(played["drafts"]["steps"]) < len(played["drafts"]["pinned"][0]) * 2 / 3
