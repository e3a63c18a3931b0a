# SPDX-License-Identifier: Apache-2.0
"""Which sequences share leading blocks of the cache, and which of them are worth one tile.

Sub-agents have their parent's prompt in the same blocks. A tile that holds rows of several of them
reads those keys once. Blocks are the same where their ids are the same, at the same position.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vllm_stateful.attention.choice import Layers, tile_rows, tile_rows_of_groups
from vllm_stateful.attention.plan import KEY_ALIGNMENT, SharedPrefix

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Lengths = Sequence[int] | Ints | Longs

MIN_KEYS = 512
"""Keys that sequences must share. Not measured on a GPU. By bytes, partial results of 32 rows (the
most of a member) are written and read for what 128 keys cost; the rest is room for what a second
item in the plan costs, and for keys of one byte."""

MOST_MEMBER_ROWS = 32
"""Rows of a member: two of them fill the largest tile that is bound by memory."""

LEAST_SAVED = 8
"""Larger tiles cost all sequences of a step, so they must save one in this many key reads. Not
measured on a GPU."""


@dataclass(frozen=True)
class Shared:
    """Sequences whose first `num_blocks` blocks are the same.

    Attributes:
        members: Indices, ascending; two or more.
        num_blocks: At least one.
    """

    members: tuple[int, ...]
    num_blocks: int


@dataclass
class _Node:
    """Rows that share `depth` blocks, no more of them that many and one.

    Attributes:
        above: Places of the nodes above it, from the root down.
        rows: Those that are in no node below it.
        gains: For each node above as the nearest that is a group, and for none (first): the most
            that can be saved below.
        is_group: For each of the same, whether that takes a group here.
    """

    depth: int
    above: list[int]
    rows: list[int] = field(default_factory=list)
    below: list[int] = field(default_factory=list)
    gains: Longs = field(default_factory=lambda: np.zeros(0, np.int64))
    is_group: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))


def share(blocks: Sequence[Ints], least: int = 1) -> list[Shared]:
    """The groups that save the most block reads, no sequence in two of them.

    A group of n that share m blocks saves ``(n - 1) * m``. Where some share more than the others do
    they may have a group of their own; the others keep theirs.

    Args:
        blocks: The ids of each sequence's computed blocks, in the order of its tokens.
        least: Blocks that a group must share.
    """
    alike: dict[int, list[int]] = {}
    for index, ids in enumerate(blocks):
        if len(ids) >= least:
            alike.setdefault(int(ids[least - 1]), []).append(index)
    groups = []
    for indices in alike.values():
        if len(indices) > 1:
            groups += _share_most(indices, [blocks[index] for index in indices], least)
    return groups


def _share_most(indices: list[int], blocks: list[Ints], least: int) -> list[Shared]:
    order = sorted(range(len(blocks)), key=lambda row: blocks[row].tobytes())
    common = [_num_common(blocks[a], blocks[b]) for a, b in itertools.pairwise(order)]
    lengths = np.asarray([each if each >= least else 0 for each in common], np.int64)
    nodes = _trie(lengths)
    _weigh(nodes)
    return [
        Shared(tuple(sorted(indices[order[row]] for row in rows)), nodes[place].depth)
        for place, rows in _chosen(nodes).items()
        if len(rows) > 1 and nodes[place].depth
    ]


def _num_common(a: Ints, b: Ints) -> int:
    size = min(len(a), len(b))
    differs = a[:size] != b[:size]
    first = int(differs.argmax()) if size else 0
    return first if size and differs[first] else size


def _trie(common: Longs) -> list[_Node]:
    """Rows in order, `common` blocks between neighbours, as a tree: parents first."""
    nodes: list[_Node] = []
    todo: list[tuple[int, int, list[int]]] = [(0, len(common) + 1, [])]
    while todo:
        begin, end, above = todo.pop()
        lengths = common[begin : end - 1]
        place, depth = len(nodes), int(lengths.min())
        node = _Node(depth, above)
        nodes.append(node)
        if above:
            nodes[above[-1]].below.append(place)
        cuts = begin + 1 + np.flatnonzero(lengths == depth)
        bounds = [begin, *cuts.tolist(), end]
        for first, last in itertools.pairwise(bounds):
            if last - first == 1:
                node.rows.append(first)
            else:
                todo.append((first, last, [*above, place]))
    return nodes


def _weigh(nodes: list[_Node]) -> None:
    """A row saves the depth of the nearest group above it, and a group pays for its own once."""
    for node in reversed(nodes):
        above = np.asarray([0, *(nodes[place].depth for place in node.above)], np.int64)
        without = len(node.rows) * above
        within = (len(node.rows) - 1) * node.depth
        for place in node.below:
            without = without + nodes[place].gains[:-1]
            within += int(nodes[place].gains[-1])
        node.is_group = within > without
        node.gains = np.maximum(within, without)


def _chosen(nodes: list[_Node]) -> dict[int, list[int]]:
    """The rows of each group, by the place of its node; those of none at -1."""
    groups: dict[int, list[int]] = {}
    nearest: list[int] = []  # for each node the group that its rows are in
    for place, node in enumerate(nodes):
        group = nearest[node.above[-1]] if node.above else -1
        option = 1 + node.above.index(group) if group >= 0 else 0
        nearest.append(place if node.is_group[option] else group)
        groups.setdefault(nearest[-1], []).extend(node.rows)
    groups.pop(-1, None)
    return groups


# ---- one step ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharedKeys:
    """What the scheduler tells of a step: requests with the same leading keys, by their ids."""

    names: tuple[Hashable, ...]
    num_keys: int


def in_batch(shared: Sequence[SharedKeys], names: Sequence[Hashable]) -> list[SharedPrefix]:
    """The same by the places in a batch; without those that are not in it."""
    places = {name: place for place, name in enumerate(names)}
    found = []
    for each in shared:
        members = sorted(places[name] for name in each.names if name in places)
        found.append(SharedPrefix(tuple(members), each.num_keys))
    return found


def tiles_to_share(
    shared: Sequence[SharedPrefix],
    query_lens: Lengths,
    seq_lens: Lengths,
    max_query_len: int,
    layers: Layers,
    *,
    rows: int | None = None,
) -> tuple[int, list[SharedPrefix]]:
    """The rows of a step's tiles, and the shared prefixes that are worth it: one for each tile.

    Args:
        shared: No sequence in two of them.
        query_lens: New tokens of each sequence.
        seq_lens: Cached and new keys of each, or upper bounds of them.
        max_query_len: The longest, or an upper bound of it.
        rows: Of the tiles, where a CUDA graph has them already.
    """
    new, total = np.asarray(query_lens, np.int64), np.asarray(seq_lens, np.int64)
    least = tile_rows(layers, max_query_len)
    able = [(_able(each, new, total, layers), each.num_keys) for each in shared]
    most = max((layers.group_size * int(new[members].sum()) for members, _ in able), default=0)
    wide = tile_rows_of_groups(layers, max_query_len, most)
    for size in dict.fromkeys((wide, least)) if rows is None else (rows,):
        prefixes = [
            SharedPrefix(tuple(tile), num_keys)
            for members, num_keys in able
            for tile in _tiles(members, layers.group_size * new, size)
            if len(tile) > 1
        ]
        saved = sum((len(each.sequences) - 1) * each.num_keys for each in prefixes)
        if size in (least, rows) or saved * LEAST_SAVED >= int(total.sum()):
            return size, prefixes
    raise AssertionError("the smallest tile is always taken")


def _able(shared: SharedPrefix, new: Longs, total: Longs, layers: Layers) -> list[int]:
    """The members that have rows, few enough, and all of the keys."""
    if shared.num_keys < KEY_ALIGNMENT or shared.num_keys % KEY_ALIGNMENT:
        return []
    members = np.asarray(shared.sequences, np.int64)
    rows, cached = layers.group_size * new[members], (total - new)[members]
    fits = (rows > 0) & (rows <= MOST_MEMBER_ROWS) & (cached >= shared.num_keys)
    able: list[int] = members[fits].tolist()
    return able


def _tiles(members: list[int], rows: Longs, size: int) -> list[list[int]]:
    """Members in their order, as many in a tile as fit."""
    tiles: list[list[int]] = []
    left = 0
    for member in members:
        if rows[member] > left or not tiles:
            tiles.append([])
            left = size
        tiles[-1].append(member)
        left -= int(rows[member])
    return tiles
