# SPDX-License-Identifier: Apache-2.0
"""Each row of a step meets each of its keys once: followed segment by segment."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np

from vllm_stateful.attention.plan import Plan, Shape, SharedPrefix, make_plan


def keys_of(
    plan: Plan, segment: np.ndarray, unit: int, new: int, total: int, shape: Shape
) -> range:
    """The keys that a segment reads for the rows of a unit."""
    _, group, block0, block1 = segment[:4].tolist()
    first, num_cached_blocks = plan.units[unit, 3:5].tolist()
    cached, size = total - new, shape.block_keys
    if group >= 0:
        return range(block0 * size, min(block1 * size, int(plan.groups[group, 2])))
    begin, end = (
        first + at * size
        if at < num_cached_blocks
        else min(cached + (at - num_cached_blocks) * size, total)
        for at in (block0, block1)
    )
    return range(begin, end)


def check_cover(
    new: list[int],
    total: list[int],
    shape: Shape,
    prefixes: list[SharedPrefix],
    window: int = 0,
) -> None:
    """Plan a step and follow the plan."""
    plan = make_plan(new, total, shape, prefixes=prefixes, window=window)
    seen: dict[int, Counter[int]] = {unit: Counter() for unit in range(len(plan.units))}
    parts: dict[int, list[int]] = {unit: [] for unit in range(len(plan.units))}
    lasts: Counter[int] = Counter()
    for segment in plan.segments:
        unit, group, _, _, part, last = segment[:6].tolist()
        members = [unit]
        if group >= 0:
            first, count = plan.groups[group, :2].tolist()
            members = plan.members[first : first + count, 0].tolist()
        lasts[unit] += last
        for member in members:
            sequence = int(plan.units[member, 0])
            keys = keys_of(plan, segment, member, new[sequence], total[sequence], shape)
            seen[member].update(keys)
            parts[member].append(part)
    slots: list[tuple[int, int]] = []
    for unit, row in enumerate(plan.units.tolist()):
        sequence, _, row0, first, _, num_parts, slot, _ = row
        rows = min(new[sequence] * shape.group_size - row0, shape.tile_rows)
        newest = total[sequence] - new[sequence] + (row0 + rows - 1) // shape.group_size
        oldest = 0
        if window:
            oldest = max(0, total[sequence] - new[sequence] + row0 // shape.group_size - window + 1)
        assert all(seen[unit][key] == 1 for key in range(oldest, newest + 1))
        assert max(seen[unit].values()) == 1
        assert sorted(parts[unit]) == list(range(num_parts))
        assert lasts[unit] == 1
        if num_parts > 1:
            slots.append((slot, slot + num_parts))
    rows_planned = Counter((row[0], row[1], row[2]) for row in plan.units.tolist())
    assert set(rows_planned.values()) <= {1}
    tiles = sum(-(-count * shape.group_size // shape.tile_rows) for count in new)
    assert len(plan.units) == tiles * shape.num_kv_heads
    slots.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(slots))
    assert plan.num_slots == sum(end - begin for begin, end in slots)
