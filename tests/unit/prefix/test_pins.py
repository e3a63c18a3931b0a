# SPDX-License-Identifier: Apache-2.0
"""The pin ledger counts blocks, not holders."""

from collections import Counter

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from vllm_stateful.prefix.pins import PinLedger
from vllm_stateful.types import BlockIds

NUM_BLOCKS = 12
SEQUENCES = st.lists(st.integers(0, NUM_BLOCKS - 1), unique=True, max_size=8)


def ids(*block_ids: int) -> BlockIds:
    return np.array(block_ids, np.int32)


def test_a_block_that_two_sessions_share_is_one_pinned_block() -> None:
    ledger = PinLedger(NUM_BLOCKS, budget_blocks=4)
    ledger.pin(ids(1, 2, 3))
    ledger.pin(ids(1, 2, 4))
    assert ledger.num_pinned == 4
    assert [ledger.holders(n) for n in range(6)] == [0, 2, 2, 1, 1, 0]
    ledger.unpin(ids(1, 2, 3))
    assert ledger.num_pinned == 3
    ledger.unpin(ids(1, 2, 4))
    assert ledger.num_pinned == 0


def test_over_budget_means_more_than_the_budget() -> None:
    ledger = PinLedger(NUM_BLOCKS, budget_blocks=2)
    ledger.pin(ids(1, 2))
    assert not ledger.over_budget
    ledger.pin(ids(3))
    assert ledger.over_budget


def test_a_budget_of_zero_is_exceeded_by_one_block() -> None:
    ledger = PinLedger(NUM_BLOCKS, budget_blocks=0)
    assert not ledger.over_budget
    ledger.pin(ids(1))
    assert ledger.over_budget


def test_no_blocks_are_no_pins() -> None:
    ledger = PinLedger(NUM_BLOCKS, budget_blocks=0)
    ledger.pin(ids())
    ledger.unpin(ids())
    assert ledger.num_pinned == 0


@given(steps=st.lists(st.tuples(st.sampled_from(["pin", "use"]), SEQUENCES), max_size=10))
def test_counts_equal_those_of_lists_of_holders_and_users(
    steps: list[tuple[str, list[int]]],
) -> None:
    """Each sequence is entered, and then all are taken out again, in the same order."""
    ledger = PinLedger(NUM_BLOCKS, budget_blocks=3)
    lists: dict[str, Counter[int]] = {"pin": Counter(), "use": Counter()}
    enter = {"pin": ledger.pin, "use": ledger.use}
    leave = {"pin": ledger.unpin, "use": ledger.unuse}
    for sign, change in ((1, enter), (-1, leave)):
        for what, sequence in steps:
            change[what](ids(*sequence))
            lists[what].update(dict.fromkeys(sequence, sign))
            held = {block for block, count in lists["pin"].items() if count}
            used = {block for block, count in lists["use"].items() if count}
            assert ledger.num_pinned == len(held)
            assert ledger.num_freeable == len(held - used)
            assert ledger.over_budget == (len(held) > 3)
            for block in range(NUM_BLOCKS):
                assert ledger.holders(block) == lists["pin"][block]
                assert ledger.users(block) == lists["use"][block]
