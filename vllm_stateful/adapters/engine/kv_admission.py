# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV cache manager, second part: take what is here, and never be refused for a pin.

Where a hit ends inside a block, vLLM 0.32 copies that block before it is written
(``SingleTypeKVCacheManager._apply_cow``). A turn that continues an idle residency at its frontier
needs neither that copy nor the reference counting: the residency's block tables move to the request
as they are.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.request import Request

from vllm_stateful.adapters.engine.kv_lookup import KVLookup
from vllm_stateful.adapters.engine.turn import Offer, Turn
from vllm_stateful.prefix.groups import ResumePoint
from vllm_stateful.prefix.groups.table import NO_IDS
from vllm_stateful.types import Demotion, Outcome


class Ask(NamedTuple):
    """The arguments of one call to ``allocate_slots``."""

    request: Request
    num_new: int
    num_computed: int
    computed: KVCacheBlocks | None
    options: dict[str, Any]


class KVAdmission(KVLookup):
    """Allocates blocks, and borrows or shares what a lookup offered."""

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        **options: Any,
    ) -> KVCacheBlocks | None:
        """Allocate blocks; demote idle residencies as long as the pool refuses.

        Refuses only where stock vLLM would refuse with no session in the cache.
        """
        ask = Ask(request, num_new_tokens, num_new_computed_tokens, new_computed_blocks, options)
        turn = self.turns.get(request.request_id)
        num_loaded = options.get("num_external_computed_tokens", 0)
        if self.loads is not None and request.num_computed_tokens == 0:
            self.loads.begins(request, num_new_computed_tokens, num_loaded)
        if turn is not None:
            turn.is_loading = num_loaded > 0
            if request.num_computed_tokens == 0:
                return self._admit(ask, turn)
            self._take_points(turn, request)
        allocated = self._stock_allocate(ask)
        while allocated is None and self._try_make_room(ask):
            allocated = self._stock_allocate(ask)
        return allocated

    def _take_points(self, turn: Turn, request: Request) -> None:
        """Take the resume points that a request has reached, before it computes more."""
        is_read = self.are_answers_read and turn.num_read < request.num_tokens
        if not turn.wanted and not is_read:
            return
        num_computed = self.running_states.position(request)
        if num_computed is None:
            turn.num_read = request.num_tokens  # the places before it are out of reach
            return
        if turn.wanted:
            self.resume_points.capture(turn, request.request_id, num_computed)
        if is_read:
            self.resume_points.read_answer(turn, request, num_computed)

    def _stock_allocate(self, ask: Ask) -> KVCacheBlocks | None:
        return super().allocate_slots(
            ask.request, ask.num_new, ask.num_computed, ask.computed, **ask.options
        )

    def _admit(self, ask: Ask, turn: Turn) -> KVCacheBlocks | None:
        """Make the first allocation of a turn: borrow or share what its lookup offered."""
        if turn.offer is not None and ask.computed is not turn.offer.blocks:
            turn.offer = None  # the caller replaced our answer
        started = time.perf_counter()
        allocated = self._adopt(ask, turn)
        while allocated is None and turn.has_made_room:
            allocated = self._adopt(ask, turn)
        turn.lookup_s += time.perf_counter() - started
        if allocated is None:
            turn.only_full_blocks = turn.offer is not None and self._may_give_up_hit()
            return None
        if turn.borrowed is not None:
            turn.points = list(turn.borrowed.points)
        elif turn.offer is not None:
            self.resume_points.inherit(turn, turn.offer.residency, turn.offer.num_tokens)
            for ids in turn.inherited_ids:
                self.store.pins.use(ids)
            self._share(turn, turn.offer)
        if not turn.is_counted:
            self._count_admission(ask, turn)
        return allocated

    def _share(self, turn: Turn, offer: Offer) -> None:
        """Note that a turn uses the full blocks of an offer; a partly filled block was copied."""
        whole = [
            table.ids[: offer.num_tokens // group.block_size]
            for group, table in zip(self.groups, offer.residency.tables, strict=True)
            if group.is_full
        ]
        turn.shared_ids = whole[0] if len(whole) == 1 else np.concatenate([NO_IDS, *whole])
        self.store.pins.use(turn.shared_ids)

    def _unshare(self, turn: Turn) -> None:
        if turn.shared_ids is not None:
            self.store.pins.unuse(turn.shared_ids)
            turn.shared_ids = None
        self._disown(turn)

    def _disown(self, turn: Turn) -> None:
        """Take the blocks of the inherited resume points off the pin ledger."""
        for ids in turn.inherited_ids:
            self.store.pins.unuse(ids)
        turn.inherited_ids = []

    def _adopt(self, ask: Ask, turn: Turn) -> KVCacheBlocks | None:
        """Allocate with the offer; if this is refused, make some room where that can help."""
        offer = turn.offer
        if offer is None or not self._is_borrowing(turn, offer):
            allocated = self._stock_allocate(ask)
            turn.has_made_room = allocated is None and self._try_make_room(ask, turn)
            return allocated
        return self._allocate_borrowing(ask, turn, offer)

    def _is_borrowing(self, turn: Turn, offer: Offer) -> bool:
        """Whether a turn borrows the offered residency, rather than share its blocks.

        It does not while KV is loaded behind the offer: a failed load must not cost the session.
        """
        return not turn.is_loading and self._continues_in_place(turn, offer)

    def _allocate_borrowing(self, ask: Ask, turn: Turn, offer: Offer) -> KVCacheBlocks | None:
        """Move the residency's block tables to the request, and append to them."""
        request_id = ask.request.request_id
        tables = self.store.borrow(offer.residency, request_id)
        self.request_tables.install(request_id, tables, offer.num_tokens)
        ask = ask._replace(computed=None)
        allocated = self._stock_allocate(ask)
        if allocated is None:
            lacking = self._num_lacking(ask)
            self.request_tables.uninstall(request_id)
            self.store.undo_borrow(offer.residency)
            turn.has_made_room = lacking is not None and self._demote_one(lacking, turn)
        else:
            turn.borrowed = offer.residency
        return allocated

    def _try_make_room(self, ask: Ask, turn: Turn | None = None) -> bool:
        """Make room for a refused request; whether there is more room, so that it may ask again."""
        lacking = self._num_lacking(ask)
        return lacking is not None and self._demote_one(lacking, turn)

    def _num_lacking(self, ask: Ask) -> int | None:
        """How many blocks a refused request lacks; None when even all pins could not help.

        It is at least 1, because vLLM also refuses for other reasons (a watermark).
        """
        request, options = ask.request, ask.options
        num_local = request.num_computed_tokens + ask.num_computed
        num_computed = num_local + options.get("num_external_computed_tokens", 0)
        num_tokens = num_computed + ask.num_new
        if options.get("full_sequence_must_fit"):
            num_tokens = max(num_tokens, request.num_tokens)
        computed = self.empty_kv_cache_blocks if ask.computed is None else ask.computed
        num_tokens = min(num_tokens, self.max_model_len)
        needed = self.coordinator.get_num_blocks_to_allocate(
            request_id=request.request_id,
            num_tokens=num_tokens,
            new_computed_blocks=computed.blocks,
            num_encoder_tokens=options.get("num_encoder_tokens", 0),
            total_computed_tokens=min(num_computed, self.max_model_len),
            num_local_computed_tokens=num_local,
            num_tokens_main_model=num_tokens,
            apply_admission_cap=True,
            prefill_end=max(request.num_prompt_tokens, request.num_tokens - 1),
        )
        num_free = self.block_pool.get_num_free_blocks()
        if needed > num_free + self.store.pins.num_freeable + self._num_points_in_use():
            return None
        return max(1, int(needed - num_free))

    def _may_give_up_hit(self) -> bool:
        """Whether a turn may lose some of its hit so that it can be admitted.

        Where every position can be continued, it loses less than a block. Elsewhere it would lose
        the whole hit, so it may only if no running turn holds blocks: then nobody else will make
        room.
        """
        if not self.store.has_points:
            return True
        return not any(any(each.req_to_blocks.values()) for each in self._managers)

    def _num_points_in_use(self) -> int:
        """The number of blocks that only one resume point of a running turn holds."""
        if not self.store.has_points:
            return 0
        return sum(self._num_own(point) for turn in self.turns.values() for point in turn.points)

    @staticmethod
    def _num_own(point: ResumePoint) -> int:
        return sum(block.ref_cnt == 1 for table in point.tables for block in table.blocks)

    def _demote_one(self, lacking: int, turn: Turn | None = None) -> bool:
        """Demote a residency for some of the lacking blocks; False when nothing is left to give.

        The residency that the turn builds on goes last. It does not go at all when the turn
        continues it in place: the turn then needs no more blocks than with stock vLLM. The resume
        points of running turns go before it.
        """
        offer = None if turn is None else turn.offer
        base = None if offer is None else offer.residency
        if self.store.demote_next(Demotion.PRESSURE, lacking, keep=base) is not None:
            return True
        if self._release_points_in_use(lacking):
            return True
        if turn is None or offer is None or not offer.residency.is_idle:
            return False
        if self._is_borrowing(turn, offer) or not self._may_give_up_hit():
            return False
        self.store.demote(offer.residency, Demotion.PRESSURE)
        return True

    def _release_points_in_use(self, lacking: int) -> bool:
        """Give back resume points of running turns, until they gave ``lacking`` blocks.

        Returns:
            Whether any block was given back.
        """
        num_given = 0
        for turn in self.turns.values():
            if num_given >= lacking:
                break
            num_own = sum(map(self._num_own, turn.points))
            if num_own:
                self._release_points(turn)
                num_given += num_own
        return num_given > 0

    def _release_points(self, turn: Turn) -> None:
        self._disown(turn)
        self.store.release_points(turn.points)
        turn.points = []
        if turn.borrowed is not None:
            turn.borrowed.points = []

    def _count_admission(self, ask: Ask, turn: Turn) -> None:
        turn.is_counted = True
        num_loaded = ask.options.get("num_external_computed_tokens", 0)
        by_vllm = Outcome.CACHED if ask.num_computed else Outcome.COLD
        outcome = by_vllm if turn.offer is None else turn.offer.outcome
        outcome = Outcome.RESTORED if num_loaded else outcome
        num_reused = ask.num_computed + num_loaded
        self.turn_counts.admitted(outcome, num_reused, ask.request.num_prompt_tokens)
        if self.records is not None:
            self.records.admitted(ask.request, turn, outcome, ask.num_computed, num_loaded)
        if turn.offer is not None:
            self.turn_counts.resumed_after(turn.lookup_s)
        if turn.offer is not None and outcome is Outcome.DIVERGED and not turn.is_beside:
            residency, num_tokens = turn.offer.residency, turn.offer.num_tokens
            self.turn_counts.edited(self.store.kind_at(residency, num_tokens).name.lower())
