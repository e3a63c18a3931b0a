# SPDX-License-Identifier: Apache-2.0
"""What runs on CUDA, model runner V2 with async scheduling, serves the same answers with us.

Each engine is a process of its own (`engine.py`, forked); Triton's interpreter stands in for a
GPU. The distribution of sampled tokens over 300 answers instead of 60:

    STATEFUL_SAMPLED=300 pytest tests/model_runner_v2/test_engine_v2.py
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import Forks

ROOT = Path(__file__).parents[2]
SIDES = ("stock", "plugin", "drafts", "adaptive", "crowded", "grammar", "head", "head-alone")
OURS = ("plugin", "drafts", "adaptive", "crowded", "head", "head-alone")
MOST_CHI_SQUARE = 3.0  # for each degree of freedom; seeds are fixed
Played = dict[str, dict[str, Any]]


def play(forks: Forks, folder: Path, side: str) -> dict[str, Any]:
    (folder / side).mkdir()
    forks.run(Path(__file__).with_name("engine.py"), folder / side, side, PYTHONPATH=str(ROOT))
    return dict(json.loads((folder / side / "answers.json").read_text()))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = tmp_path_factory.mktemp("v2")
    forks = Forks("on_host", "vllm.entrypoints.llm", path=(Path(__file__).parent,))
    with ThreadPoolExecutor(2) as pool:
        sides = pool.map(lambda side: play(forks, folder, side), SIDES)
        return dict(zip(SIDES, sides, strict=True))


@pytest.mark.parametrize("side", OURS)
@pytest.mark.parametrize("kind", ["turns", "options"])
def test_answers_are_those_of_stock(side: str, kind: str, played: Played) -> None:
    stock, ours = played["stock"][kind], played[side][kind]
    assert [said for *said, _ in ours] == [said for *said, _ in stock]


@pytest.mark.parametrize("side", ["plugin", "drafts", "adaptive", "crowded"])
def test_a_logit_bias_and_min_p_are_served_beside_drafts(side: str, played: Played) -> None:
    stock, ours = played["stock"]["processed"], played[side]["processed"]
    assert [said for *said, _ in ours] == [said for *said, _ in stock]
    assert len({tuple(said) for *said, _ in stock}) == 3, "a bias changes the answer"
    assert stock[2][:-1] == stock[3][:-1]
    if side == "drafts":
        assert played[side]["verified beside"] > 50


@pytest.mark.parametrize("side", ["head", "head-alone"])
def test_turns_are_resumed_beside_a_head(side: str, played: Played) -> None:
    """Of the last turns all but what is new, and the token that the head needs."""
    asked = [cached for *_, cached in played[side]["turns"]][-3:]
    stock = [cached for *_, cached in played["stock"]["turns"]][-3:]
    assert all(ours > theirs for ours, theirs in zip(asked, stock, strict=True))


@pytest.mark.parametrize("side", ["plugin", "drafts", "adaptive"])
def test_turns_are_resumed_inside_a_block(side: str, played: Played) -> None:
    cached, stock = ([cached for *_, cached in played[each]["turns"]] for each in (side, "stock"))
    assert all(ours >= theirs for ours, theirs in zip(cached, stock, strict=True))
    assert sum(cached) > sum(stock) + 100


def test_requests_that_were_preempted_are_answered_as_by_stock(played: Played) -> None:
    stock, crowded = played["stock"], played["crowded"]
    assert crowded["preempted"] > 0
    assert [said for *said, _ in crowded["long answers"]] == [
        said for *said, _ in stock["long answers"]
    ]


@pytest.mark.parametrize("side", ["plugin", "crowded"])
def test_prompts_may_come_as_arrays(side: str, played: Played) -> None:
    written = played[side]["written"]
    assert len(written) > len(played[side]["turns"]) + len(played[side]["options"])
    assert max(written) > 100


@pytest.mark.parametrize("side", ["drafts", "adaptive", "crowded", "head"])
def test_what_an_agent_said_is_drafted_for_it_and_for_nobody_else(
    side: str, played: Played
) -> None:
    ours, stock = played[side]["said_before"], played["stock"]["said_before"]
    assert ours["answers"] == stock["answers"]
    (first, _), (again, drafted) = ours["steps"]["first"], ours["steps"]["again"]
    assert again < first / 3
    assert drafted > 0
    assert ours["steps"]["elsewhere"] == ours["steps"]["first"]


def test_a_grammar_bounds_what_is_drafted(played: Played) -> None:
    answers = played["grammar"]["grammars"]
    assert answers[:3] == answers[3:]
    letters, text, choice = answers[:3]
    assert re.fullmatch("[ab]{4,8}", letters)
    assert re.match(r"\s*\{\s*\"a\"\s*:", text)
    assert choice in ("one of these", "or this")
    assert played["grammar"]["stats"]["num_drafts_accepted"] > 0


def test_a_head_that_is_never_right_costs_no_step(played: Played) -> None:
    alone, stock = (played[side]["said_before"]["steps"] for side in ("head-alone", "stock"))
    assert [num for num, _ in alone.values()] == [num for num, _ in stock.values()]


@pytest.mark.parametrize("side", ["plugin", "drafts", "adaptive", "crowded"])
def test_drafts_are_counted(side: str, played: Played) -> None:
    stats = played[side]["stats"]
    assert (stats["num_drafts_accepted"] > 0) == (side != "plugin")
    assert stats["num_tokens_drafted"] >= stats["num_drafts_accepted"]


@pytest.mark.parametrize("side", ["drafts", "crowded", "head"])
def test_a_request_may_want_no_drafts(side: str, played: Played) -> None:
    num_steps, num_drafted = played[side]["said_before"]["steps"]["unwanted"]
    assert num_steps == played["stock"]["said_before"]["steps"]["unwanted"][0]
    assert num_drafted <= 6, "vLLM fills up the first step, for its CUDA graphs"


def test_adaptive_verification_verifies_what_is_worth_it(played: Played) -> None:
    fixed, adaptive = (played[side]["said_before"]["steps"] for side in ("drafts", "adaptive"))
    assert adaptive["first"][1] < fixed["first"][1] / 2, "hardly anything is found"
    assert adaptive["again"][1] > fixed["again"][1] * 0.7, "all of it is"


def test_sampled_tokens_keep_their_distribution(played: Played) -> None:
    """Rejection sampling: exact chances of the first and of the second token, chi-square."""
    expected = np.array(played["stock"]["chances"])
    counts = np.zeros_like(expected)
    for first, second in played["drafts"]["sampled"]:
        counts[first, second] += 1
    tried, kept = played["drafts"]["verified"]
    assert kept > 0.2 * counts.sum()
    assert tried - kept > 0.2 * counts.sum()
    for axis in (0, 1):
        chances, seen = expected.sum(axis) * counts.sum(), counts.sum(axis)
        likely = chances >= 5
        chances = np.append(chances[likely], chances[~likely].sum())
        seen = np.append(seen[likely], seen[~likely].sum())
        chi_square = ((seen - chances) ** 2 / chances).sum()
        assert chi_square < MOST_CHI_SQUARE * (len(chances) - 1)
