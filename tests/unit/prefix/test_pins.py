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


@given(sequences=st.lists(SEQUENCES, max_size=8), data=st.data())
def test_counts_equal_those_of_a_list_of_holders(
    sequences: list[list[int]], data: st.DataObject
) -> None:
    ledger = PinLedger(NUM_BLOCKS, budget_blocks=3)
    held: list[list[int]] = []
    for sequence in sequences:
        ledger.pin(ids(*sequence))
        held.append(sequence)
        if data.draw(st.booleans()):
            ledger.unpin(ids(*held.pop(data.draw(st.integers(0, len(held) - 1)))))
        holders = Counter(block for kept in held for block in kept)
        assert ledger.num_pinned == len(holders)
        assert [ledger.holders(n) for n in range(NUM_BLOCKS)] == [
            holders[n] for n in range(NUM_BLOCKS)
        ]
        assert ledger.over_budget == (len(holders) > 3)
