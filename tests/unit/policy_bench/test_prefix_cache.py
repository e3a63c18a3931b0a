# SPDX-License-Identifier: Apache-2.0
"""The simulated cache against sets of blocks, under every policy."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.policy.policies import POLICIES
from benchmarks.policy.prefix_cache import PrefixCache, Run
from benchmarks.policy.traces import NEVER, Turn, in_order, working_set

LRU, *OTHERS, BELADY = POLICIES


def turns_of(steps: Sequence[tuple[int, int, int, int, int]]) -> list[Turn]:
    """Each step keeps a part of its thread's blocks and adds some; ids stand for whole prefixes."""
    ids: dict[tuple[int, ...], int] = {}
    before: dict[int, list[tuple[int, ...]]] = {}
    turns, now_s = [], 0.0
    for thread, keep, new, mark, gap in steps:
        prefixes = before.get(thread, [])[:keep]
        for _ in range(new):
            prefixes = [*prefixes, (*(prefixes[-1] if prefixes else ()), mark)]
        before[thread] = prefixes
        now_s += gap
        blocks = np.array([ids.setdefault(p, len(ids)) for p in prefixes], np.int64)
        turns.append(Turn(thread, "all", blocks, now_s, now_s + gap / 2, bool(mark % 2)))
    return in_order(turns)


STEPS = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.integers(0, 12),
        st.integers(1, 6),
        st.integers(0, 3),
        st.sampled_from([0, 1, 30, 1000]),
    ),
    min_size=1,
    max_size=40,
)


def resident(cache: PrefixCache) -> set[int]:
    """All resident blocks; each with all before it."""
    found: set[int] = set()
    waiting: list[tuple[Run, bool]] = [(root, True) for root in cache._roots.values()]
    while waiting:
        run, may_hold = waiting.pop()
        assert may_hold or not run.num_resident
        found.update(run.blocks[: run.num_resident].tolist())
        is_whole = run.num_resident == len(run.blocks)
        waiting += [(child, may_hold and is_whole) for child in run.children.values()]
    return found


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=60, deadline=None)
@given(steps=STEPS, capacity=st.integers(1, 40))
def test_each_turn_computes_what_is_not_resident(
    name: str, steps: list[tuple[int, int, int, int, int]], capacity: int
) -> None:
    cache = PrefixCache(capacity, POLICIES[name]())
    for turn in turns_of(steps):
        before = resident(cache)
        overfull = cache.num_overfull
        computed = cache.begin(turn)
        assert computed == len(set(turn.blocks.tolist()) - before)
        after = resident(cache)
        assert set(turn.blocks.tolist()) <= after
        assert cache.num_used == len(after)
        assert after - before <= set(turn.blocks.tolist())
        if cache.num_overfull == overfull:
            assert cache.num_used <= capacity or not computed


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, capacity=st.integers(8, 40))
def test_nothing_beats_the_one_that_knows_the_future(
    steps: list[tuple[int, int, int, int, int]], capacity: int
) -> None:
    turns = turns_of(steps)
    for number, turn in enumerate(turns):  # one at a time
        turn.arrived_s, turn.ended_s = 10.0 * number, 10.0 * number + 1
    computed = {}
    for name, make in POLICIES.items():
        cache = PrefixCache(capacity, make())
        cache.play(turns)
        computed[name] = cache.num_computed
        if cache.num_overfull:
            return
    assert min(computed.values()) == computed[BELADY]


def test_a_cache_that_holds_all_computes_what_is_new() -> None:
    turns = turns_of([(0, 0, 4, 1, 1), (0, 4, 2, 1, 1), (0, 3, 2, 2, 1), (1, 0, 3, 1, 1)])
    for make in POLICIES.values():
        cache = PrefixCache(100, make())
        cache.play(turns)
        assert cache.num_computed == 4 + 2 + 2


def test_next_use_and_working_set() -> None:
    turns = turns_of([(0, 0, 2, 1, 1), (1, 0, 3, 2, 1), (0, 1, 1, 3, 1), (0, 2, 1, 3, 1)])
    assert [t.next_use.tolist() for t in turns if t.next_use is not None] == [
        [2, NEVER],
        [NEVER] * 3,
        [3, 3],
        [NEVER] * 3,
    ]
    assert working_set(turns) == 2 + 3
