# SPDX-License-Identifier: Apache-2.0
"""Recurrent states beside drafts, as on CUDA: a turn goes on where the last one ended.

Each engine is a process of its own (`states.py`, forked); see `test_engine_v2.py`.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from forked import Forks

ROOT = Path(__file__).parents[2]
SIDES = ("stock", "plugin", "mtp")
BLOCK = {"plugin": 128, "mtp": 2048}  # tokens, at least
NUM_DRAFTS = 3  # as in `states.py`
Played = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = tmp_path_factory.mktemp("states")
    forks = Forks("on_host", "vllm.entrypoints.llm", path=(Path(__file__).parent,))

    def play(side: str) -> dict[str, Any]:
        (folder / side).mkdir()
        forks.run(Path(__file__).with_name("states.py"), folder / side, side, PYTHONPATH=str(ROOT))
        return dict(json.loads((folder / side / "answers.json").read_text()))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SIDES, pool.map(play, SIDES), strict=True))


@pytest.mark.parametrize("name", ["first", "again"])
def test_answers_are_those_of_stock_without_drafts(name: str, played: Played) -> None:
    wanted = [turn["tokens"] for turn in played["stock"]["first"]]
    assert [turn["tokens"] for turn in played["plugin"][name]] == wanted


@pytest.mark.parametrize(
    ("side", "name"), [("plugin", "first"), ("plugin", "again"), ("mtp", "first")]
)
def test_a_turn_computes_what_it_adds(side: str, name: str, played: Played) -> None:
    """Answers that end with a stop token are not computed again, but at the end of a block."""
    turns, num_exact, block = played[side][name], 0, BLOCK[side]
    for before, turn in pairwise(turns):
        assert before["reason"] == "stop"
        known = before["prompt"] + len(before["tokens"])
        if known // block == (known + NUM_DRAFTS) // block:
            assert turn["cached"] == known
            num_exact += 1
    assert num_exact


def test_drafts_were_right_and_wrong(played: Played) -> None:
    stats = played["plugin"]["stats"]
    assert 20 < stats["num_drafts_accepted"] < stats["num_tokens_drafted"]
