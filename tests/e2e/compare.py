# SPDX-License-Identifier: Apache-2.0
"""What two plays of one scenario (``play.py``) must have in common."""

from collections.abc import Callable
from typing import Any

Play = Callable[..., dict[str, Any]]


def by_name(played: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {turn["name"]: turn for turn in played["turns"]}


def assert_same_answers(stock: dict[str, Any], plugin: dict[str, Any]) -> int:
    """Every turn that was not aborted has the same prompt and the same answer."""
    expected = by_name(stock)
    compared = 0
    for turn in plugin["turns"]:
        other = expected[turn["name"]]
        assert turn["prompt"] == other["prompt"], turn["name"]
        if not turn["aborted"]:
            assert turn["answer"] == other["answer"], turn["name"]
            compared += 1
    print(f"{compared} answers equal; {plugin['stats']['turns']}; {plugin['pool_after_close']}")
    return compared


def num_recomputed(played: dict[str, Any]) -> dict[str, int]:
    """Per turn: tokens that the turn before had computed, and that were computed again."""
    previous: dict[str, list[int]] = {}
    recomputed = {}
    for turn in played["turns"]:
        agent = turn["name"].rsplit("/", 1)[0]
        before = previous.get(agent, [])
        computed_before = len(before) - 1
        if before and turn["prompt"][: len(before)] == before:
            recomputed[turn["name"]] = computed_before - turn["num_cached"]
        previous[agent] = turn["prompt"] + turn["answer"]
    return recomputed


def assert_little_recomputed(
    stock: dict[str, Any], plugin: dict[str, Any], block_size: int
) -> None:
    """With the plugin at most one token; otherwise it would not show anything about it."""
    recomputed = num_recomputed(plugin)
    print(f"{len(recomputed)} continuing turns, most recomputed: {max(recomputed.values())} tokens")
    assert len(recomputed) >= 50
    assert max(recomputed.values()) <= 1
    assert max(num_recomputed(stock).values()) > block_size // 2


def assert_nothing_lost(played: dict[str, Any]) -> None:
    pool = played["pool_after_close"]
    assert pool["free"] == pool["total"]
    assert pool["used"] == pool["pinned"] == 0
