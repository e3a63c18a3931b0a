# SPDX-License-Identifier: Apache-2.0
"""Finds sequences that share leading blocks of the cache, and puts them into one tile if it pays.

Sub-agents have their parent's prompt in the same blocks. A tile with rows of several sub-agents
reads those keys once. Two sequences share a block if they have the same block id at the same
position.
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
"""Keys that sequences must share. This is not measured on a GPU. Counted in bytes, writing and
reading partial results of 32 rows (the most of a member) costs as much as 128 keys. The rest covers
the cost of a second item in the plan, and keys of one byte."""

MOST_MEMBER_ROWS = 32
"""The most rows of a member. Two such members fill the largest tile that is bound by memory."""

LEAST_SAVED = 8
"""Larger tiles cost time for all sequences of a step. So they must save at least one in this many
key reads. This is not measured on a GPU."""


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
    """A node of the trie: a maximal set of rows that share the first `depth` blocks.

    Attributes:
        depth: Blocks that its rows share.
        above: Places of the nodes above it, from the root down.
        rows: Its rows that are in no node below it.
        below: Places of the nodes directly below it.
        gains: The most block reads that can be saved here and below. One entry for each possible
            nearest group above: first for none, then for each node of `above`.
        is_group: For the same cases, whether this node must be a group to save that many.
    """

    depth: int
    above: list[int]
    rows: list[int] = field(default_factory=list)
    below: list[int] = field(default_factory=list)
    gains: Longs = field(default_factory=lambda: np.zeros(0, np.int64))
    is_group: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))


def share(blocks: Sequence[Ints], least: int = 1) -> list[Shared]:
    """Find the groups that save the most block reads. No sequence is in two of them.

    A group of n sequences that share m blocks saves ``(n - 1) * m`` reads. Sequences of a group
    that share more blocks than the others may form a group of their own; the others stay together.

    Args:
        blocks: For each sequence the ids of its computed blocks, in the order of its tokens.
        least: The least number of blocks that a group must share.
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
    """Build the trie of sorted rows. Parents come before their children.

    Args:
        common: ``[num_rows - 1]``: the blocks that neighbouring rows have in common.
    """
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
    """Fill `gains` and `is_group` of all nodes, from the leaves up.

    Each row saves the depth of its nearest group; a group pays for its depth once.
    """
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
    """The rows of each group, by the place of its node. Rows in no group are left out."""
    groups: dict[int, list[int]] = {}
    nearest: list[int] = []  # for each node the group of its rows, -1 for none
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
    """Requests with the same leading keys, by their ids: the scheduler tells these for a step."""

    names: tuple[Hashable, ...]
    num_keys: int


def in_batch(shared: Sequence[SharedKeys], names: Sequence[Hashable]) -> list[SharedPrefix]:
    """Replace request ids by places in the batch. Requests that are not in it are left out."""
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
    """Choose the rows of a step's tiles, and the shared prefixes that pay: one for each tile.

    Args:
        shared: The shared prefixes. No sequence may be in two of them.
        query_lens: New tokens of each sequence.
        seq_lens: Cached and new keys of each sequence, or upper bounds of them.
        max_query_len: The maximum of `query_lens`, or an upper bound of it.
        layers: The layers of the step.
        rows: Rows of the tiles, if a CUDA graph fixes them; None to choose them.
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
    """The members that have all shared keys cached, and between 1 and `MOST_MEMBER_ROWS` rows."""
    if shared.num_keys < KEY_ALIGNMENT or shared.num_keys % KEY_ALIGNMENT:
        return []
    members = np.asarray(shared.sequences, np.int64)
    rows, cached = layers.group_size * new[members], (total - new)[members]
    fits = (rows > 0) & (rows <= MOST_MEMBER_ROWS) & (cached >= shared.num_keys)
    able: list[int] = members[fits].tolist()
    return able


def _tiles(members: list[int], rows: Longs, size: int) -> list[list[int]]:
    """Fill tiles of `size` rows with members, in their order."""
    tiles: list[list[int]] = []
    left = 0
    for member in members:
        if rows[member] > left or not tiles:
            tiles.append([])
            left = size
        tiles[-1].append(member)
        left -= int(rows[member])
    return tiles
