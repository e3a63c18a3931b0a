# SPDX-License-Identifier: Apache-2.0
"""Plans which thread block computes what in one step. One plan serves all layers.

All work of a step is a sequence of key blocks: sequence by sequence, and KV head by KV head. It is
cut into as many contiguous ranges of equal cost as there are thread blocks. The arrays have the
same fields in the same order as csrc/include/stateful/plan.cuh.

Source: stream-K (arXiv:2301.03598) and FlashMLA's scheduler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

UNIT_FIELDS = (
    "sequence",
    "head",
    "row0",
    "first_key",
    "num_cached_blocks",
    "num_parts",
    "slot",
    "padding",
)
SEGMENT_FIELDS = ("unit", "group", "block0", "block1", "part", "last", "padding0", "padding1")
KEY_ALIGNMENT = 16  # keys in the smallest page, and in a TMA box


@dataclass(frozen=True)
class Shape:
    """The sizes for which a kernel was compiled and is launched.

    Attributes:
        num_ctas: Thread blocks of the grid, all resident at once.
        tile_rows: Rows of a tile; a row is one query head at one token.
        block_keys: Keys of a block.
        num_kv_heads: KV heads of the layer, on this device.
        group_size: Query heads of one KV head.
        overhead: Cost of beginning a tile, in key blocks.
        least_cost: The least work for which one more thread block is used, in key blocks.
    """

    num_ctas: int
    tile_rows: int
    block_keys: int
    num_kv_heads: int
    group_size: int
    overhead: int = 1
    least_cost: int = 3


@dataclass(frozen=True)
class SharedPrefix:
    """Sequences whose first `num_keys` keys are in the same pages.

    Attributes:
        sequences: Indices in the batch, ascending.
        num_keys: A multiple of `KEY_ALIGNMENT`, at most the cached keys of each sequence.
    """

    sequences: tuple[int, ...]
    num_keys: int


@dataclass(frozen=True)
class Plan:
    """The plan of one step. The arrays are int32 in C order.

    Attributes:
        cta_segments: ``[num_ctas + 1]``: the first segment of each thread block, and the end.
        segments: ``[num_segments, 8]``, see `SEGMENT_FIELDS`.
        units: ``[num_units, 8]``, see `UNIT_FIELDS`.
        groups: ``[num_groups, 4]``: first member, number of members, number of keys, 0.
        members: ``[num_members, 2]``: the unit, and its first row in the group's tile.
        num_slots: Number of partial results, of ``tile_rows`` rows each.
    """

    cta_segments: Ints
    segments: Ints
    units: Ints
    groups: Ints
    members: Ints
    num_slots: int


@dataclass(frozen=True)
class _Units:
    """One column per field, with one entry per unit: ordered by sequence, KV head, tile of rows."""

    sequence: Longs
    head: Longs
    row0: Longs
    num_rows: Longs
    first_key: Longs
    num_cached_blocks: Longs
    num_blocks: Longs


def make_plan(
    query_lens: Sequence[int] | Ints,
    seq_lens: Sequence[int] | Ints,
    shape: Shape,
    *,
    prefixes: Sequence[SharedPrefix] = (),
    window: int = 0,
    exact: bool = True,
) -> Plan:
    """Cut a step's attention into even shares.

    Args:
        query_lens: New tokens of each sequence; 0 for one that has nothing to do.
        seq_lens: Cached and new keys of each sequence, or upper bounds of them.
        shape: The sizes of the kernel.
        prefixes: Shared prefixes. No sequence may be in two of them. Not possible with a window.
        window: Keys that a token sees, its own included; 0: all.
        exact: Whether the lengths are exact. If so, keys outside the window are left out of the
            plan.

    Raises:
        ValueError: the lengths do not fit each other, prefixes overlap or are longer than what a
            sequence has cached, or there are prefixes and a window.
    """
    new = np.asarray(query_lens, dtype=np.int64)
    total = np.asarray(seq_lens, dtype=np.int64)
    if new.shape != total.shape or new.ndim != 1:
        raise ValueError(f"{new.shape} query lengths for {total.shape} sequence lengths")
    if (new < 0).any() or (total < new).any():
        raise ValueError("a sequence is shorter than its new tokens")
    cached = total - new
    shared = _shared_keys(prefixes, cached, new, window)
    units = _units(new, cached, shared, shape, window if exact else 0)
    groups, members, group_blocks = _groups(prefixes, units, shape)
    blocks = np.concatenate([group_blocks, units.num_blocks])
    item, block0, block1, cta_segments = _cut(blocks, shape)
    return _assemble(units, groups, members, item, block0, block1, cta_segments)


def _shared_keys(prefixes: Sequence[SharedPrefix], cached: Longs, new: Longs, window: int) -> Longs:
    shared = np.zeros_like(cached)
    for prefix in prefixes:
        chosen = np.asarray(prefix.sequences, dtype=np.int64)
        if window:
            raise ValueError("a shared prefix and a window")
        if prefix.num_keys <= 0 or prefix.num_keys % KEY_ALIGNMENT:
            raise ValueError(f"a shared prefix of {prefix.num_keys} keys")
        if len(set(prefix.sequences)) != len(prefix.sequences) or shared[chosen].any():
            raise ValueError("a sequence in two shared prefixes")
        if (cached[chosen] < prefix.num_keys).any() or not new[chosen].all():
            raise ValueError("a shared prefix is longer than what a sequence has cached")
        shared[chosen] = prefix.num_keys
    return shared


def _units(new: Longs, cached: Longs, shared: Longs, shape: Shape, window: int) -> _Units:
    num_tiles = -(-new * shape.group_size // shape.tile_rows)
    counts = num_tiles * shape.num_kv_heads
    sequence = np.repeat(np.arange(len(new)), counts)
    place = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    head, tile = np.divmod(place, num_tiles[sequence]) if len(sequence) else (place, place)
    row0 = tile * shape.tile_rows
    num_rows = np.minimum(new[sequence] * shape.group_size - row0, shape.tile_rows)
    first_key = shared[sequence]
    if window:
        oldest = cached[sequence] + row0 // shape.group_size - window + 1
        first_key = np.maximum(oldest, 0) // KEY_ALIGNMENT * KEY_ALIGNMENT
        first_key = np.minimum(first_key, cached[sequence] // KEY_ALIGNMENT * KEY_ALIGNMENT)
    num_cached = -(-(cached[sequence] - first_key) // shape.block_keys)
    seen_new = -(-(row0 + num_rows) // shape.group_size)
    num_blocks = num_cached - (-seen_new // shape.block_keys)
    return _Units(sequence, head, row0, num_rows, first_key, num_cached, num_blocks)


def _groups(
    prefixes: Sequence[SharedPrefix], units: _Units, shape: Shape
) -> tuple[list[tuple[int, int, int, int]], list[tuple[int, int]], Longs]:
    """Pack the rows of sequences that share a prefix into tiles, KV head by KV head."""
    groups: list[tuple[int, int, int, int]] = []
    members: list[tuple[int, int]] = []
    sizes = units.num_rows.tolist() if prefixes else []
    for prefix in prefixes:
        chosen = sorted(prefix.sequences)
        begins = np.searchsorted(units.sequence, chosen).tolist()
        ends = np.searchsorted(units.sequence, chosen, side="right").tolist()
        for head in range(shape.num_kv_heads):
            row, first = 0, len(members)
            for unit in _units_of_head(begins, ends, head, shape.num_kv_heads):
                num_rows = sizes[unit]
                if row + num_rows > shape.tile_rows:
                    groups.append((first, len(members) - first, prefix.num_keys, 0))
                    row, first = 0, len(members)
                members.append((unit, row))
                row += num_rows
            groups.append((first, len(members) - first, prefix.num_keys, 0))
    keys = np.asarray([group[2] for group in groups], dtype=np.int64)
    return groups, members, -(-keys // shape.block_keys)


def _units_of_head(begins: list[int], ends: list[int], head: int, num_heads: int) -> Iterator[int]:
    for begin, end in zip(begins, ends, strict=True):
        num_tiles = (end - begin) // num_heads
        yield from range(begin + head * num_tiles, begin + (head + 1) * num_tiles)


def _cut(blocks: Longs, shape: Shape) -> tuple[Longs, Longs, Longs, Longs]:
    """Cut all items, laid end to end, into segments for the thread blocks.

    Args:
        blocks: ``[num_items]``: the key blocks of each item.
        shape: The sizes of the kernel.

    Returns:
        For each segment its item and its blocks ``[block0, block1)`` in that item; and the first
        segment of each thread block, ``[num_ctas + 1]``.
    """
    num_blocks = int(blocks.sum())
    ends = np.concatenate([[0], np.cumsum(blocks)])
    costs = np.concatenate([[0], np.cumsum(blocks + shape.overhead)])
    num_used = min(shape.num_ctas, max(1, int(costs[-1]) // shape.least_cost))
    at = np.arange(num_used) * int(costs[-1]) // num_used
    cut_item = np.minimum(np.searchsorted(costs, at, side="right") - 1, max(len(blocks) - 1, 0))
    if num_blocks:
        inside = np.clip(at - costs[cut_item] - shape.overhead, 0, blocks[cut_item])
        cuts = ends[cut_item] + inside
    else:
        cuts = np.zeros(num_used, dtype=np.int64)
    bounds = np.unique(np.concatenate([cuts, ends]))
    begin, end = bounds[:-1], bounds[1:]
    item = np.searchsorted(ends, begin, side="right") - 1
    cta = np.searchsorted(cuts, begin, side="right") - 1
    cta_segments = np.searchsorted(cta, np.arange(shape.num_ctas + 1))
    return item, begin - ends[item], end - ends[item], cta_segments


def _assemble(
    units: _Units,
    groups: list[tuple[int, int, int, int]],
    members: list[tuple[int, int]],
    item: Longs,
    block0: Longs,
    block1: Longs,
    cta_segments: Longs,
) -> Plan:
    num_groups, num_units = len(groups), len(units.sequence)
    counts = np.bincount(item, minlength=num_groups + num_units)
    first = np.cumsum(counts) - counts
    part = np.arange(len(item)) - first[item]
    members_array = np.asarray(members, dtype=np.int32).reshape(-1, 2)
    groups_array = np.asarray(groups, dtype=np.int32).reshape(-1, 4)
    before = np.zeros(num_units, dtype=np.int64)  # parts from a unit's group, before its own parts
    before[members_array[:, 0]] = np.repeat(counts[:num_groups], groups_array[:, 1])
    num_parts = before + counts[num_groups:]
    num_slots = np.where(num_parts > 1, num_parts, 0)
    slot = np.cumsum(num_slots) - num_slots

    grouped = item < num_groups
    unit = np.where(grouped, 0, item - num_groups)
    segments = np.zeros((len(item), len(SEGMENT_FIELDS)), dtype=np.int32)
    if grouped.any():
        unit[grouped] = members_array[groups_array[item[grouped], 0], 0]
    segments[:, 0] = unit
    segments[:, 1] = np.where(grouped, item, -1)
    segments[:, 2] = block0
    segments[:, 3] = block1
    segments[:, 4] = np.where(grouped, part, part + before[unit]) if len(item) else part
    segments[:, 5] = ~grouped & (part + 1 == counts[item])
    columns = (units.sequence, units.head, units.row0, units.first_key, units.num_cached_blocks)
    table = np.zeros((num_units, len(UNIT_FIELDS)), dtype=np.int32)
    for place, column in enumerate((*columns, num_parts, slot)):
        table[:, place] = column
    return Plan(
        cta_segments.astype(np.int32),
        segments,
        table,
        groups_array,
        members_array,
        int(num_slots.sum()),
    )
