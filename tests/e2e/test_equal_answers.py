# SPDX-License-Identifier: Apache-2.0
"""With the plugin the answers are those of stock vLLM, and a turn costs what is new in it.

``pytest tests/e2e/test_equal_answers.py -rP`` prints the figures behind each line.
"""

import pytest
from compare import (
    Play,
    assert_little_recomputed,
    assert_nothing_lost,
    assert_same_answers,
    by_name,
)
from local_models import SMOLLM2

pytestmark = pytest.mark.e2e
SHORT = ("--max-tokens", "8")


def test_fp32_answers_equal_stock_turn_by_turn(play: Play) -> None:
    """Interleaved, with and without ids, edited, forked in three, aborted, two tenants."""
    stock, plugin = play(SMOLLM2, *SHORT), play(SMOLLM2, "--plugin", *SHORT)
    assert plugin["scheduler"] == "StatefulScheduler"
    assert stock["scheduler"] == "Scheduler"
    assert assert_same_answers(stock, plugin) >= 60
    outcomes = plugin["stats"]["turns"]
    assert outcomes["resumed"] >= 50
    assert outcomes["diverged"] >= 1
    assert outcomes["forked"] >= 1
    assert_nothing_lost(plugin)


def test_no_turn_recomputes_what_the_turn_before_computed(play: Play) -> None:
    """At most one token; stock recomputes up to a block."""
    assert_little_recomputed(
        play(SMOLLM2, *SHORT), play(SMOLLM2, "--plugin", *SHORT), block_size=32
    )


def test_two_tenants_with_one_session_id_share_nothing(play: Play) -> None:
    turns = by_name(play(SMOLLM2, "--plugin", *SHORT))
    for tenant in "ab":
        assert turns[f"tenant-{tenant}/0"]["num_cached"] == 0
        assert turns[f"tenant-{tenant}/1"]["num_cached"] > 0
