# SPDX-License-Identifier: Apache-2.0
"""With the plugin the answers are those of stock vLLM, and a turn costs what is new in it.

``pytest tests/e2e/test_equal_answers.py -rP`` prints the figures behind each line.
"""

from collections.abc import Callable
from typing import Any

import pytest
from local_models import SMOLLM2, TINY

Play = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.e2e

BF16_LOGPROB_TOLERANCE = 0.05


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


def assert_nothing_lost(played: dict[str, Any]) -> None:
    pool = played["pool_after_close"]
    assert pool["free"] == pool["total"]
    assert pool["used"] == pool["pinned"] == 0


def test_fp32_answers_equal_stock_turn_by_turn(play: Play) -> None:
    """Interleaved, with and without ids, edited, forked in three, aborted, two tenants."""
    stock, plugin = play(SMOLLM2), play(SMOLLM2, "--plugin")
    assert plugin["scheduler"] == "StatefulScheduler"
    assert stock["scheduler"] == "Scheduler"
    assert assert_same_answers(stock, plugin) >= 60
    outcomes = plugin["stats"]["turns"]
    assert outcomes["resumed"] >= 50
    assert outcomes["diverged"] >= 1
    assert outcomes["forked"] >= 1
    assert_nothing_lost(plugin)


@pytest.mark.parametrize("block_size", ["32", "128"])
def test_no_turn_recomputes_what_the_turn_before_computed(play: Play, block_size: str) -> None:
    """At most one token, with small and with large blocks; stock recomputes up to a block."""
    options = () if block_size == "32" else ("--block-size", block_size)
    model = SMOLLM2 if block_size == "32" else TINY
    recomputed = num_recomputed(play(model, "--plugin", *options))
    print(f"{len(recomputed)} continuing turns, most recomputed: {max(recomputed.values())} tokens")
    assert len(recomputed) >= 50
    assert max(recomputed.values()) <= 1
    stock = num_recomputed(play(model, *options))
    assert max(stock.values()) > int(block_size) // 2


def test_large_blocks_give_the_same_answers(play: Play) -> None:
    assert_same_answers(
        play(TINY, "--block-size", "128"), play(TINY, "--plugin", "--block-size", "128")
    )


def test_two_tenants_with_one_session_id_share_nothing(play: Play) -> None:
    turns = by_name(play(SMOLLM2, "--plugin"))
    for tenant in "ab":
        assert turns[f"tenant-{tenant}/0"]["num_cached"] == 0
        assert turns[f"tenant-{tenant}/1"]["num_cached"] > 0


def test_preempted_turns_give_the_same_answers(play: Play) -> None:
    """A KV cache that holds two of six agents."""
    small = ("--scenario", "pressure", "--num-blocks", "100")
    stock, plugin = play(TINY, *small), play(TINY, "--plugin", *small)
    assert sum(turn["num_preemptions"] for turn in plugin["turns"]) > 0
    assert assert_same_answers(stock, plugin) == 24
    assert plugin["stats"]["demotions"]["pressure"] > 0
    assert_nothing_lost(plugin)


def test_200_sessions_over_a_cache_that_holds_20(play: Play) -> None:
    """All are answered, the books balance in every step, and no block is lost."""
    arguments = ("--scenario", "many", "--num-blocks", "80", "--max-tokens", "4")
    plugin = play(TINY, "--plugin", *arguments)
    assert len(plugin["turns"]) == 400
    assert all(len(turn["answer"]) > 0 for turn in plugin["turns"])
    assert plugin["stats"]["demotions"]["budget"] > 0
    assert_nothing_lost(plugin)


def test_ngram_speculation_resumes_at_accepted_tokens_only(play: Play) -> None:
    """Rejected drafts leave KV behind the frontier; it must never be taken for context."""
    stock, plugin = play(TINY), play(TINY, "--plugin", "--speculate")
    assert_same_answers(stock, plugin)


def test_bf16_first_token_logprobs_are_within_tolerance(play: Play, recorded: str) -> None:
    """bf16 rounds differently when a prompt is cut differently, so compare probabilities."""
    arguments = ("--dtype", "bfloat16", "--prompts", recorded)
    stock = by_name(play(TINY, *arguments))
    plugin = by_name(play(TINY, "--plugin", *arguments))
    worst = 0.0
    for name, turn in plugin.items():
        shared = turn["first_logprobs"].keys() & stock[name]["first_logprobs"].keys()
        assert shared, name
        for token in shared:
            difference = turn["first_logprobs"][token] - stock[name]["first_logprobs"][token]
            worst = max(worst, abs(difference))
    print(f"{len(plugin)} turns, worst difference {worst:.2g}")
    assert worst <= BF16_LOGPROB_TOLERANCE
