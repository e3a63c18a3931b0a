# SPDX-License-Identifier: Apache-2.0
"""Checks the block pool, block by block: ``free + used + pinned == total``."""

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_stateful.adapters.engine.kv_blocks import StatefulKVCacheManager
from vllm_stateful.errors import InvariantError

Counts = NDArray[np.int64]
"""Shape ``[num_blocks]``: how often each block is held."""


def check_pool(scheduler: Scheduler) -> dict[str, int]:
    """Check that every reference on a block has a known holder, and that no block is lost.

    A block is *used* when a request's block table holds it, *pinned* when only idle
    residencies do, and *free* when neither does.

    Args:
        scheduler: one whose manager is stateful, between two of its methods (a pending
            copy-on-write holds references of its own until ``schedule`` returns).

    Returns:
        The counts ``free``, ``used``, ``pinned`` and ``total`` (the null block is not counted).

    Raises:
        InvariantError: the counts of a block do not agree. Names the first such block.
    """
    manager = scheduler.kv_cache_manager
    assert isinstance(manager, StatefulKVCacheManager)
    blocks, pins = manager.block_pool.blocks, manager.store.pins
    used = _used_by_requests(manager)
    pinned = _pinned_by_residencies(manager)
    deferred = _counted((held for _, held in scheduler.deferred_frees), len(blocks))
    counted = np.fromiter(map(attrgetter("ref_cnt"), blocks), np.int64, len(blocks))
    held = used + pinned + deferred
    held[manager.block_pool.null_block.block_id] = counted[manager.block_pool.null_block.block_id]
    for block_id in np.flatnonzero(counted != held):
        raise InvariantError(
            f"block {block_id}: ref_cnt {counted[block_id]}, but requests hold it "
            f"{used[block_id]} times and residencies {pinned[block_id]} times"
        )
    for block_id in np.flatnonzero(pins.users_of_all > used):
        raise InvariantError(f"block {block_id}: the pin ledger miscounts its users")
    for block_id in np.flatnonzero(pins.holders_of_all != pinned):
        raise InvariantError(f"block {block_id}: the pin ledger miscounts its holders")
    return _totals(manager, used + deferred, pinned)


def _counted(tables: Iterable[Iterable[Any]], num_blocks: int) -> Counts:
    ids = [block.block_id for blocks in tables for block in blocks]
    return np.bincount(np.asarray(ids, np.int64), minlength=num_blocks)


def _used_by_requests(manager: StatefulKVCacheManager) -> Counts:
    pool = manager.block_pool
    managers = manager.coordinator.single_type_managers
    tables = [blocks for each in managers for blocks in each.req_to_blocks.values()]
    tables += [point.blocks for turn in manager.turns.values() for point in turn.points]
    used = _counted(tables, len(pool.blocks))
    used[pool.null_block.block_id] = 0
    return used


def _pinned_by_residencies(manager: StatefulKVCacheManager) -> Counts:
    idle = [r for r in manager.store.residencies() if r.borrower is None]
    held = [r.blocks for r in idle] + [point.blocks for r in idle for point in r.points]
    return _counted(held, len(manager.block_pool.blocks))


def _totals(manager: StatefulKVCacheManager, used: Counts, pinned: Counts) -> dict[str, int]:
    num_free = manager.block_pool.get_num_free_blocks()
    num_used, num_pinned = int(np.count_nonzero(used)), int(np.count_nonzero(pinned))
    num_pinned_only = int(np.count_nonzero((pinned > 0) & (used == 0)))
    total = manager.block_pool.num_gpu_blocks - 1
    if num_free + num_used + num_pinned_only != total:
        raise InvariantError(
            f"free {num_free} + used {num_used} + pinned {num_pinned_only} != total {total}"
        )
    if num_pinned != manager.store.pins.num_pinned:
        raise InvariantError(
            f"the pin ledger counts {manager.store.pins.num_pinned} blocks, not {num_pinned}"
        )
    return {"free": num_free, "used": num_used, "pinned": num_pinned_only, "total": total}
