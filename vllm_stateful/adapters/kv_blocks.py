# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV cache manager, extended by residencies: resume, share, keep, give back.

The four methods below are the whole life of a turn's blocks: ``get_computed_blocks`` (what is
here), ``allocate_slots`` (take it, never fail because of a pin), ``free`` (keep it),
``reset_prefix_cache`` (drop it). Everything else is vLLM's own. vLLM 0.32 adopts a hit that
ends inside a block by copying that block on write (``SingleTypeKVCacheManager._apply_cow``);
a turn that continues an idle residency at its frontier is spared the copy and the reference
counting: the block list moves to the request as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.request import Request, RequestStatus

from vllm_stateful.adapters.turn import (
    Offer,
    Turn,
    bypass_reason,
    is_final,
    session_of,
    start_turn,
    tokens_so_far,
)
from vllm_stateful.observe.turn_counts import TurnCounts
from vllm_stateful.prefix.residency import FinishedTurn, Match, Residency, ResidencyStore
from vllm_stateful.types import Bypass, Demotion, Outcome, SessionKey

Computed = tuple[KVCacheBlocks, int, int]
"""Blocks, number of computed tokens, shared-prefix boundary: as vLLM's own method returns."""


class StatefulKVCacheManager(KVCacheManager):  # type: ignore[misc]
    """A ``KVCacheManager`` with one full-attention group whose finished turns stay resident.

    Not constructed: ``adapters.scheduler`` turns the manager that the stock scheduler built
    into one (``become_stateful``), so that no constructor argument is repeated here.
    """

    store: ResidencyStore
    turns: dict[str, Turn]
    bypassed: set[str]
    turn_counts: TurnCounts
    idle_seconds: float
    epoch: int

    def become_stateful(
        self, *, pin_fraction: float, idle_seconds: float, clock: Callable[[], float]
    ) -> None:
        """Add the residencies' state to a manager that the stock constructor made."""
        num_blocks = self.block_pool.num_gpu_blocks
        self.store = ResidencyStore(
            block_size=self._block_size,
            num_blocks=num_blocks,
            budget_blocks=int(pin_fraction * (num_blocks - 1)),
            release=self.block_pool.free_blocks,
            clock=clock,
        )
        self.turns = {}
        self.bypassed = set()
        self.turn_counts = TurnCounts()
        self.idle_seconds = idle_seconds
        self.epoch = 0

    @property
    def _group(self) -> Any:
        (group,) = self.coordinator.single_type_managers
        return group

    @property
    def _block_size(self) -> int:
        return int(self._group.block_size)

    @property
    def usage(self) -> float:
        """Share of the blocks in use; pinned blocks count as free, for they are on demand."""
        total = self.block_pool.num_gpu_blocks - 1
        used = total - self.block_pool.get_num_free_blocks() - self.store.pins.num_pinned
        return max(used, 0) / total if total else 0.0

    # ---- what is here --------------------------------------------------------------------

    def get_computed_blocks(self, request: Request) -> Computed:
        """The longest prefix of the request that is in the cache, exact to the token.

        A residency wins over vLLM's block hashes unless those reach further.
        """
        started = time.perf_counter()
        turn = self._turn_of(request)
        if turn is None:
            return self._stock_lookup(request)
        computed = self._lookup(request, turn)
        turn.lookup_s += time.perf_counter() - started
        return computed

    def _turn_of(self, request: Request) -> Turn | None:
        turn = self.turns.get(request.request_id)
        if turn is not None:
            return turn
        reason = bypass_reason(request, self.enable_caching)
        if reason is not None:
            self._count_bypass(request, reason)
            return None
        turn = self.turns[request.request_id] = start_turn(request, self.epoch)
        return turn

    def _count_bypass(self, request: Request, reason: Bypass) -> None:
        if request.request_id not in self.bypassed:
            self.bypassed.add(request.request_id)
            self.turn_counts.bypassed(reason)

    def _lookup(self, request: Request, turn: Turn) -> Computed:
        tokens = turn.prompt
        if request.num_tokens > len(tokens):  # preempted after it had generated something
            tokens = tokens_so_far(turn, request, request.num_tokens)
        match = self.store.match(session_of(request), tokens, request.num_tokens - 1)
        turn.session, turn.offer = match.session, self._offer(match, turn)
        if turn.offer is None or self._stock_reaches_further(request, turn.offer.num_tokens):
            turn.offer = None
            return self._stock_lookup(request)
        return turn.offer.blocks, turn.offer.num_tokens, 0

    def _stock_lookup(self, request: Request) -> Computed:
        computed: Computed = super().get_computed_blocks(request)
        return computed

    def _offer(self, match: Match, turn: Turn) -> Offer | None:
        """The blocks behind a match: to the exact token, or whole ones only."""
        found, num_tokens = match.residency, match.num_tokens
        if found is None:
            return None
        if turn.only_full_blocks and num_tokens != found.frontier:
            num_tokens -= num_tokens % self._block_size
        if num_tokens == 0:
            return None
        blocks = found.blocks[: -(-num_tokens // self._block_size)]
        return Offer(KVCacheBlocks((blocks,)), found, num_tokens, match.outcome)

    def _stock_reaches_further(self, request: Request, num_hit: int) -> bool:
        """Whether the block hash chain goes on after our hit: one probe, as it is a chain."""
        next_block = num_hit // self._block_size
        usable_blocks = (request.num_tokens - 1) // self._block_size
        if next_block >= min(usable_blocks, len(request.block_hashes)):
            return False
        block_hash = request.block_hashes[next_block]
        return self.block_pool.get_cached_block(block_hash, [0]) is not None

    # ---- take it -------------------------------------------------------------------------

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        **options: Any,
    ) -> KVCacheBlocks | None:
        """Allocate, demoting idle residencies as long as the pool refuses.

        Refuses only when stock vLLM would, with no session in the cache.
        """
        turn = self.turns.get(request.request_id)
        if turn is None or request.num_computed_tokens > 0:
            return self._demoting(
                lambda: self._stock_allocate(
                    request, num_new_tokens, num_new_computed_tokens, new_computed_blocks, options
                )
            )
        started = time.perf_counter()
        allocated = self._admit(
            request, turn, num_new_tokens, num_new_computed_tokens, new_computed_blocks, options
        )
        turn.lookup_s += time.perf_counter() - started
        if allocated is not None and not turn.is_counted:
            self._count_admission(request, turn, num_new_computed_tokens)
        return allocated

    def _stock_allocate(
        self,
        request: Request,
        num_new: int,
        num_computed: int,
        computed: KVCacheBlocks | None,
        options: dict[str, Any],
    ) -> KVCacheBlocks | None:
        return super().allocate_slots(request, num_new, num_computed, computed, **options)

    def _admit(
        self,
        request: Request,
        turn: Turn,
        num_new: int,
        num_computed: int,
        computed: KVCacheBlocks | None,
        options: dict[str, Any],
    ) -> KVCacheBlocks | None:
        """The first allocation of a turn: borrow or share what its lookup offered."""
        offer = turn.offer
        if offer is not None and computed is not offer.blocks:
            offer = turn.offer = None  # somebody replaced our answer

        def attempt() -> KVCacheBlocks | None:
            if offer is not None and offer.continues and self._can_append(offer.residency):
                return self._allocate_borrowing(request, turn, offer, num_new, options)
            return self._stock_allocate(request, num_new, num_computed, computed, options)

        allocated = self._demoting(attempt, offer)
        if allocated is None:
            turn.only_full_blocks = offer is not None
        return allocated

    def _can_append(self, residency: Residency) -> bool:
        """False when vLLM hashed the partly filled last block as full: others may read it."""
        is_partial = residency.frontier % self._block_size != 0
        return not is_partial or residency.blocks[-1].block_hash is None

    def _allocate_borrowing(
        self, request: Request, turn: Turn, offer: Offer, num_new: int, options: dict[str, Any]
    ) -> KVCacheBlocks | None:
        """Move the residency's block list to the request, and append to it."""
        group, request_id = self._group, request.request_id
        group.req_to_blocks[request_id] = self.store.borrow(offer.residency, request_id)
        group.num_cached_block[request_id] = offer.num_tokens // self._block_size
        allocated = self._stock_allocate(request, num_new, offer.num_tokens, None, options)
        if allocated is None:
            del group.req_to_blocks[request_id]
            del group.num_cached_block[request_id]
            self.store.give_back(offer.residency)
        else:
            turn.borrowed = offer.residency
        return allocated

    def _demoting(
        self, attempt: Callable[[], KVCacheBlocks | None], offer: Offer | None = None
    ) -> KVCacheBlocks | None:
        """Try, and as long as the pool refuses, give it the least valuable residency's blocks."""
        allocated = attempt()
        while allocated is None and self._demote_one(offer):
            allocated = attempt()
        return allocated

    def _demote_one(self, offer: Offer | None) -> bool:
        """False when no residency is left to give.

        The one that the turn builds on goes last, and not at all when the turn continues it in
        place: then it needs no block that stock vLLM would not need.
        """
        base = None if offer is None else offer.residency
        if self.store.demote_next(Demotion.PRESSURE, keep=base) is not None:
            return True
        if offer is None or offer.continues or base is None or not base.is_idle:
            return False
        self.store.demote(base, Demotion.PRESSURE)
        return True

    def _count_admission(self, request: Request, turn: Turn, num_reused: int) -> None:
        turn.is_counted = True
        outcome = Outcome.COLD if turn.offer is None else turn.offer.outcome
        self.turn_counts.admitted(outcome, num_reused, request.num_prompt_tokens)
        if turn.offer is not None:
            self.turn_counts.resumed_after(turn.lookup_s)

    # ---- keep it -------------------------------------------------------------------------

    def free(self, request: Request) -> None:
        """Keep a finished turn's blocks with its session; free those of any other request."""
        turn = self.turns.pop(request.request_id, None)
        if request.is_finished():
            self.bypassed.discard(request.request_id)
        if turn is None or not request.is_finished():
            self._free_unfinished(request, turn)
        elif turn.epoch != self.epoch or request.status == RequestStatus.FINISHED_ERROR:
            self._forfeit(turn)
            super().free(request)
        elif is_final(request):
            self._forfeit(turn)
            super().free(request)
            self.store.close(turn.session)
        else:
            self._keep(request, turn)

    def _free_unfinished(self, request: Request, turn: Turn | None) -> None:
        """A preempted turn loses its blocks, as in stock vLLM, and looks up again later."""
        if turn is not None:
            self._forfeit(turn)
            self.turns[request.request_id] = turn
        super().free(request)

    def _forfeit(self, turn: Turn) -> None:
        if turn.borrowed is not None:
            self.store.forfeit(turn.borrowed)
        turn.borrowed = turn.offer = None

    def _keep(self, request: Request, turn: Turn) -> None:
        frontier = request.num_computed_tokens - request.num_output_placeholders
        blocks = self.pop_blocks_for_free(request)
        num_kept = -(-frontier // self._block_size)
        self.block_pool.free_blocks(reversed(blocks[num_kept:]))
        del blocks[num_kept:]
        if frontier <= 0:
            return
        self.store.finish(
            FinishedTurn(
                session=turn.session,
                tokens=tokens_so_far(turn, request, frontier),
                blocks=blocks,
                borrowed=turn.borrowed,
                base=None if turn.offer is None else turn.offer.residency,
                num_base_tokens=0 if turn.offer is None else turn.offer.num_tokens,
            )
        )
        self.store.enforce_budget()

    # ---- drop it -------------------------------------------------------------------------

    def reset_prefix_cache(self) -> bool:
        """Drop every residency, then reset as vLLM does. Running turns will not be kept."""
        self.epoch += 1
        self.store.reset()
        return bool(super().reset_prefix_cache())

    def close_session(self, session: SessionKey) -> int:
        """Release what a session keeps. Returns the number of branches that were dropped."""
        return self.store.close(session)

    def new_step_starts(self) -> None:
        """Called by the scheduler at the start of each step; ends idle sessions."""
        self.store.expire(self.idle_seconds)
        super().new_step_starts()
