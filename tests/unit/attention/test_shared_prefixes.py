# SPDX-License-Identifier: Apache-2.0
"""Who shares a prefix, against all partitions; and the plans that come of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_cover import check_cover

from vllm_stateful.attention import choice, shared_prefixes
from vllm_stateful.attention.choice import Layers, tile_rows
from vllm_stateful.attention.plan import Shape, SharedPrefix
from vllm_stateful.attention.shared_prefixes import (
    LEAST_SAVED,
    MOST_MEMBER_ROWS,
    Shared,
    SharedKeys,
    in_batch,
    share,
    tiles_to_share,
)

LLAMA = Layers(head_size=128, group_size=4, page_size=16, is_half_precision=True, capability=(9, 0))
Blocks = list[list[int]]


@st.composite
def families(draw: st.DrawFn, most: int = 6) -> Blocks:
    """Sequences that begin as others do, of few ids so that equal ones also stand apart."""
    found: Blocks = []
    for _ in range(draw(st.integers(0, most))):
        parent = draw(st.sampled_from(found)) if found else []
        kept = parent[: draw(st.integers(0, len(parent)))]
        found.append(kept + draw(st.lists(st.integers(0, 2), max_size=5)))
    return found


def partitions(members: list[int]) -> Iterator[list[list[int]]]:
    if not members:
        yield []
        return
    first, *rest = members
    for smaller in partitions(rest):
        yield [[first], *smaller]
        for place, part in enumerate(smaller):
            yield [*smaller[:place], [first, *part], *smaller[place + 1 :]]


def num_shared(blocks: Blocks, members: list[int]) -> int:
    columns = zip(*(blocks[member] for member in members), strict=False)
    num = 0
    for column in columns:
        if len(set(column)) > 1:
            break
        num += 1
    return num


def most_saved(blocks: Blocks, least: int) -> int:
    def value(part: list[int]) -> int:
        num = num_shared(blocks, part)
        return (len(part) - 1) * num if num >= least else 0

    return max(sum(map(value, parts)) for parts in partitions(list(range(len(blocks)))))


def arrays(blocks: Blocks) -> list[np.ndarray]:
    return [np.asarray(each, np.int32) for each in blocks]


@given(families(), st.integers(1, 4))
def test_no_partition_saves_more(blocks: Blocks, least: int) -> None:
    groups = share(arrays(blocks), least)
    members = [member for group in groups for member in group.members]
    assert len(set(members)) == len(members)
    for group in groups:
        assert list(group.members) == sorted(group.members)
        assert len(group.members) > 1
        assert least <= group.num_blocks <= num_shared(blocks, list(group.members))
    saved = sum((len(group.members) - 1) * group.num_blocks for group in groups)
    assert saved == most_saved(blocks, least)


def test_a_few_that_share_more_leave_the_others_their_group() -> None:
    system = list(range(10))
    parent = [*system, *range(100, 140)]
    blocks = [[*system, 1], [*parent, 2], [*system, 3], [*parent, 4], [*parent, 5], [7, 8, 9]]
    groups = share(arrays(blocks))
    assert sorted(groups, key=lambda group: group.num_blocks) == [
        Shared((0, 2), 10),
        Shared((1, 3, 4), 50),
    ]


def test_equal_ids_count_at_equal_places_only() -> None:
    assert share(arrays([[1, 2, 3], [2, 3], [9, 2, 3]])) == []


def test_many_levels() -> None:
    chain = [list(range(length)) for length in range(1, 400)]
    saved = sum((len(group.members) - 1) * group.num_blocks for group in share(arrays(chain)))
    assert saved > sum(map(len, chain)) / 2


def test_places_in_a_batch() -> None:
    shared = [SharedKeys(("a", "b", "c"), 512)]
    assert in_batch(shared, ["c", "x", "a"]) == [SharedPrefix((0, 2), 512)]


# ---- one step


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[SharedPrefix], list[int], list[int], Layers]:
    """Shared prefixes, some of them longer than what is cached; new lengths, total lengths."""
    layers = replace(LLAMA, group_size=draw(st.sampled_from((1, 4, 7))))
    lengths = st.tuples(st.integers(0, 20), st.integers(0, 300))
    pairs = draw(st.lists(lengths, max_size=8))
    new = [a for a, _ in pairs]
    if draw(st.booleans()):
        layers = replace(layers, capability=(8, 0))
    owners = draw(st.lists(st.integers(0, 2), min_size=len(pairs), max_size=len(pairs)))
    shared = []
    for owner in range(2):
        members = tuple(index for index, each in enumerate(owners) if each == owner)
        if members:
            shared.append(SharedPrefix(members, draw(st.sampled_from((0, 8, 16, 48, 256)))))
    return shared, new, [a + b for a, b in pairs], layers


@given(batches(), st.integers(1, 9), st.sampled_from((32, 64)))
def test_plans_are_whole(
    batch: tuple[list[SharedPrefix], list[int], list[int], Layers], num_ctas: int, block_keys: int
) -> None:
    shared, new, total, layers = batch
    longest = max(new, default=1)
    rows, prefixes = tiles_to_share(shared, new, total, longest, layers)
    assert rows >= tile_rows(layers, longest)
    groups = {member: each for each in shared for member in each.sequences}
    for prefix in prefixes:
        members = prefix.sequences
        assert {groups[member].num_keys for member in members} == {prefix.num_keys}
        assert len(members) > 1
        assert sum(new[member] for member in members) * layers.group_size <= rows
        assert max(new[member] for member in members) * layers.group_size <= MOST_MEMBER_ROWS
    if rows > tile_rows(layers, longest):
        saved = sum((len(each.sequences) - 1) * each.num_keys for each in prefixes)
        assert saved * LEAST_SAVED >= sum(total)
    check_cover(new, total, Shape(num_ctas, rows, block_keys, 2, layers.group_size), prefixes)


@pytest.mark.parametrize(
    ("new", "rows", "tiles"),
    [
        ([2, 2, 2, 2], 32, [(0, 1, 2, 3)]),
        ([4] * 8, 64, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ([8, 8, 8], 64, [(0, 1)]),  # the third alone gains nothing
        ([9, 9], 64, []),
        ([4, 0, 4, 9], 64, [(0, 2)]),
        ([4, 4, 100], 128, [(0, 1)]),
        ([4, 4, 512], 128, [(0, 1)]),
    ],
)
def test_tiles(new: list[int], rows: int, tiles: list[tuple[int, ...]]) -> None:
    total = [4096 + each for each in new]
    shared = [SharedPrefix(tuple(range(len(new))), 4096)]
    found, prefixes = tiles_to_share(shared, new, total, max(new), LLAMA)
    assert found == rows
    assert [prefix.sequences for prefix in prefixes] == tiles


def test_all_others_are_not_slowed_down_for_a_few() -> None:
    new, total = [3] * 10, [100_000] * 8 + [1000] * 2
    shared = [SharedPrefix((8, 9), 512)]
    assert tiles_to_share(shared, new, total, 3, LLAMA) == (16, [])
    assert tiles_to_share(shared, [2] * 10, total, 2, LLAMA) == (16, shared)


def test_without_tiles_of_mma(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "ROWS_OF_MMA", ())
    shared = [SharedPrefix((0, 1), 512)]
    assert tiles_to_share(shared, [2, 2], [600, 600], 2, LLAMA) == (128, shared)


def test_the_least_is_a_whole_number_of_smallest_pages() -> None:
    assert shared_prefixes.MIN_KEYS % 16 == 0
