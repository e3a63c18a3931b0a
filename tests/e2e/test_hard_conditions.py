# SPDX-License-Identifier: Apache-2.0
"""Large blocks, a KV cache that is too small, drafts, bf16: still the answers of stock vLLM."""

import pytest
from compare import (
    Play,
    assert_little_recomputed,
    assert_nothing_lost,
    assert_same_answers,
    by_name,
)
from local_models import TINY

pytestmark = pytest.mark.e2e

BF16_LOGPROB_TOLERANCE = 0.05


def test_large_blocks_give_the_same_answers(play: Play) -> None:
    stock = play(TINY, "--block-size", "128")
    plugin = play(TINY, "--plugin", "--block-size", "128")
    assert_same_answers(stock, plugin)
    assert_little_recomputed(stock, plugin, block_size=128)


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


def test_sessions_that_come_back_from_the_offload_tier_give_the_same_answers(play: Play) -> None:
    """Two of six agents fit into the KV cache, all six into vLLM's offload tier."""
    small = ("--scenario", "pressure", "--num-blocks", "100")
    stock = play(TINY, *small)
    plugin = play(TINY, "--plugin", *small, "--offload", str(256 * 1024**2))
    assert assert_same_answers(stock, plugin) == 24
    assert plugin["stats"]["turns"]["restored"] > 0
    computed = plugin["stats"]["num_tokens_computed"]
    without = play(TINY, "--plugin", *small)["stats"]["num_tokens_computed"]
    print(f"{computed} prompt tokens computed; without the tier {without}")
    assert computed < without
    assert_nothing_lost(plugin)


def test_several_kv_connectors_at_once_give_the_same_answers(play: Play) -> None:
    """Two offload tiers in a ``MultiConnector``: sessions resume, and come back from the first."""
    small = ("--scenario", "pressure", "--num-blocks", "100")
    stock = play(TINY, *small)
    tiers = ("--offload", str(256 * 1024**2), "--several")
    plugin = play(TINY, "--plugin", *small, *tiers)
    assert assert_same_answers(stock, plugin) == 24
    outcomes = plugin["stats"]["turns"]
    print(outcomes)
    assert outcomes["restored"] > 0
    assert outcomes["resumed"] > 0
    assert_nothing_lost(plugin)


def test_ngram_speculation_resumes_at_accepted_tokens_only(play: Play) -> None:
    """Rejected drafts leave KV behind the frontier; it must never be taken for context."""
    stock, plugin = play(TINY), play(TINY, "--plugin", "--speculate")
    assert_same_answers(stock, plugin)


def test_drafts_from_sessions_change_no_answer(play: Play) -> None:
    stock, plugin = play(TINY), play(TINY, "--plugin", "--session-drafts")
    assert_same_answers(stock, plugin)
    drafted = plugin["stats"]["num_tokens_drafted"]
    accepted = plugin["stats"]["num_drafts_accepted"]
    print(f"{accepted} of {drafted} drafted tokens accepted")
    assert accepted > 0
    assert_nothing_lost(plugin)


def test_bf16_first_token_logprobs_are_within_tolerance(play: Play, recorded: str) -> None:
    """bf16 rounds differently when a prompt is cut differently, so compare probabilities."""
    arguments = ("--dtype", "bfloat16", "--prompts", recorded, "--max-tokens", "1")
    arguments += ("--logprobs", "5")
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
