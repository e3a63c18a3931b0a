# SPDX-License-Identifier: Apache-2.0
"""The books of the block pool: ``free + used + pinned == total``, checked block by block."""

from collections import Counter

from vllm.v1.core.sched.scheduler import Scheduler

from vllm_stateful.adapters.kv_blocks import StatefulKVCacheManager
from vllm_stateful.errors import InvariantError


def check_pool(scheduler: Scheduler) -> dict[str, int]:
    """Check that every block's reference count is explained, and none is lost.

    A block is *used* when a request's block table holds it, *pinned* when only idle
    residencies do, *free* when nobody does.

    Args:
        scheduler: one whose manager is stateful, between two of its methods (a pending
            copy-on-write holds references of its own until ``schedule`` returns).

    Returns:
        The counts ``free``, ``used``, ``pinned`` and ``total`` (the null block is not counted).

    Raises:
        InvariantError: naming the first block whose books do not agree.
    """
    manager = scheduler.kv_cache_manager
    assert isinstance(manager, StatefulKVCacheManager)
    used = _used_by_requests(manager)
    pinned = _pinned_by_residencies(manager)
    deferred = Counter(b.block_id for _, blocks in scheduler.deferred_frees for b in blocks)
    held = used + pinned + deferred
    for block in manager.block_pool.blocks:
        if block.is_null:
            continue
        if block.ref_cnt != held[block.block_id]:
            raise InvariantError(
                f"block {block.block_id}: ref_cnt {block.ref_cnt}, but requests hold it "
                f"{used[block.block_id]} times and residencies {pinned[block.block_id]} times"
            )
        if manager.store.pins.users(block.block_id) > used[block.block_id]:
            raise InvariantError(f"block {block.block_id}: the pin ledger miscounts its users")
        if pinned[block.block_id] != manager.store.pins.holders(block.block_id):
            raise InvariantError(f"block {block.block_id}: the pin ledger miscounts its holders")
    return _totals(manager, used + deferred, pinned)


def _used_by_requests(manager: StatefulKVCacheManager) -> Counter[int]:
    tables = manager.coordinator.single_type_managers[0].req_to_blocks.values()
    return Counter(block.block_id for blocks in tables for block in blocks if not block.is_null)


def _pinned_by_residencies(manager: StatefulKVCacheManager) -> Counter[int]:
    idle = (r for r in manager.store.residencies() if r.borrower is None)
    return Counter(block.block_id for residency in idle for block in residency.blocks)


def _totals(
    manager: StatefulKVCacheManager, used: Counter[int], pinned: Counter[int]
) -> dict[str, int]:
    num_free = manager.block_pool.get_num_free_blocks()
    num_pinned_only = sum(1 for block_id in pinned if block_id not in used)
    total = manager.block_pool.num_gpu_blocks - 1
    if num_free + len(used) + num_pinned_only != total:
        raise InvariantError(
            f"free {num_free} + used {len(used)} + pinned {num_pinned_only} != total {total}"
        )
    if len(pinned) != manager.store.pins.num_pinned:
        raise InvariantError(
            f"the pin ledger counts {manager.store.pins.num_pinned} blocks, not {len(pinned)}"
        )
    return {"free": num_free, "used": len(used), "pinned": num_pinned_only, "total": total}
