# SPDX-License-Identifier: Apache-2.0
"""Maps vLLM's KV cache groups to groups that can be continued, and moves their block tables.

vLLM has one manager for each group, and a running request has a block table in each manager. A turn
that continues a residency in place gets all of its tables at once. When a turn ends, all tables are
taken from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    FullAttentionManager,
    MambaManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
)

from vllm_stateful.errors import UnsupportedError
from vllm_stateful.prefix.groups import (
    ChunkGroup,
    FullGroup,
    Group,
    StateGroup,
    Table,
    WindowGroup,
)
from vllm_stateful.prefix.groups.table import Blocks, Tables


def group_of(manager: Any) -> Group:
    """The group that says what a turn needs of one manager's KV to continue.

    Args:
        manager: vLLM's ``SingleTypeKVCacheManager`` of the group.

    Raises:
        UnsupportedError: the manager keeps its KV in a way that is not known here. The message says
            which.
    """
    spec, size = manager.kv_cache_spec, int(manager.block_size)
    kinds = (type(manager), type(spec))
    if kinds in (
        (FullAttentionManager, FullAttentionSpec),
        (FullAttentionManager, MLAAttentionSpec),
    ):
        if spec.non_causal:
            raise UnsupportedError("its attention is not causal")
        return _uncompressed(FullGroup(size), spec)
    if kinds in (
        (SlidingWindowManager, SlidingWindowSpec),
        (SlidingWindowManager, SlidingWindowMLASpec),
    ):
        window = manager.sliding_window + manager.extra_retained_tokens
        return _uncompressed(WindowGroup(size, window=window), spec)
    if kinds == (ChunkedLocalAttentionManager, ChunkedLocalAttentionSpec):
        return _uncompressed(ChunkGroup(size, chunk=manager.attention_chunk_size), spec)
    if kinds == (MambaManager, MambaSpec):
        if manager.mamba_cache_mode != "align":
            raise UnsupportedError(f"its states are kept in the mode {manager.mamba_cache_mode!r}")
        if manager.has_prefill_checkpoint_blocks and manager.block_pool.hash_block_size < size:
            raise UnsupportedError("its states are saved within chunks, at parts of a block")
        return StateGroup(size)
    raise UnsupportedError(
        f"a KV cache group is a {type(spec).__name__} kept by a {type(manager).__name__}"
    )


def _uncompressed(group: Group, spec: Any) -> Group:
    """The same group, if each slot holds one token.

    Raises:
        UnsupportedError: one slot holds several tokens, so a position may lie inside a slot.
    """
    if spec.tokens_per_state != 1:
        raise UnsupportedError("its KV is compressed")
    return group


def kinds_of(groups: Sequence[Group]) -> str:
    """A text that says how many groups of each kind there are."""
    names = [
        "full" if group.is_full else "state" if group.is_state else "window" for group in groups
    ]
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


def in_place(table: Table, null: Any) -> Blocks:
    """A new list of a table's blocks, with null blocks before the part that is held."""
    return [null] * table.start + table.blocks


def _num_hashed(blocks: Blocks, least: int, most: int) -> int:
    """The number of leading blocks that vLLM must not hash again: up to the last that bears a hash.

    vLLM itself hashes only up to a common multiple of all groups' block sizes (``least``). But a
    longer history that was cut back to this one may have hashed more.
    """
    for place in range(most, least, -1):
        if blocks[place - 1].block_hash is not None:
            return place
    return least


class RequestTables:
    """Gives requests block tables in all managers, and takes them away.

    Args:
        coordinator: vLLM's coordinator of the managers.
        groups: one group for each manager.
    """

    def __init__(self, coordinator: Any, groups: Sequence[Group]) -> None:
        self._coordinator = coordinator
        self._managers = coordinator.single_type_managers
        self._groups = groups
        self._pool = coordinator.block_pool

    def install(self, request_id: str, tables: Tables, position: int) -> None:
        """Let a request continue at a position, without any copy or reference counting."""
        for place, (manager, table) in enumerate(zip(self._managers, tables, strict=True)):
            # The table of a full group grows in place. Other tables may belong to a resume point,
            # too.
            is_full = self._groups[place].is_full
            blocks = table.blocks if is_full else in_place(table, self._pool.null_block)
            manager.req_to_blocks[request_id] = blocks
            cached = self._coordinator.get_num_cacheable_tokens(position, place)
            manager.num_cached_block[request_id] = _num_hashed(
                blocks, cached // manager.block_size, position // manager.block_size
            )

    def uninstall(self, request_id: str) -> None:
        """Undo ``install``, before the request was given any block."""
        for manager in self._managers:
            manager.pop_blocks_for_free(request_id)

    def take(
        self, request_id: str, frontier: int, known: Tables | None, *, has_state: bool
    ) -> tuple[Tables, Tables | None]:
        """Take all tables from a request that has ended.

        Args:
            request_id: the request.
            frontier: the number of tokens whose KV is kept. Blocks behind it go back to the pool.
            known: the tables of the residency that it continued, whose ids are known; None without
                one.
            has_state: whether the states are those at the frontier.

        Returns:
            The tables of the full groups, and the tables of the other groups that continue the
            frontier. The latter are None where all groups are full, or where a block that is needed
            is missing.
        """
        full: list[Table] = []
        held: list[Table] = []
        is_complete = frontier > 0
        for place, (group, manager) in enumerate(zip(self._groups, self._managers, strict=True)):
            blocks = manager.req_to_blocks.get(request_id, [])
            manager.pop_blocks_for_free(request_id)  # what it returns may lack leading null blocks
            first, end = group.first(frontier), group.end(frontier)
            kept = blocks[first:end]
            self._free(blocks[:first] + blocks[end:])
            if group.is_full:
                ids = None if known is None else known[place].ids
                full.append(Table.of(kept) if ids is None else Table.of(kept, known=ids))
                held.append(Table.empty())
                continue
            full.append(Table.empty())
            held.append(Table.of(kept, first))
            is_complete = is_complete and len(kept) == end - first
            is_complete = is_complete and not any(block.is_null for block in kept)
            is_complete = is_complete and (has_state or not group.is_state)
        if all(group.is_full for group in self._groups):
            return tuple(full), None
        if is_complete:
            return tuple(full), tuple(held)
        for table in held:
            self._free(table.blocks)
        return tuple(full), None

    def _free(self, blocks: Blocks) -> None:
        self._pool.free_blocks(block for block in reversed(blocks) if not block.is_null)
