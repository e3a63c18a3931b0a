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

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.request import Request, RequestStatus

from vllm_stateful.adapters.turn import (
    Offer,
    Turn,
    bypass_reason,
    forced_tool,
    is_final,
    output_array,
    retention_wish,
    start_turn,
    tokens_so_far,
)
from vllm_stateful.observe.turn_counts import TurnCounts
from vllm_stateful.prefix.boundaries import BoundaryRules
from vllm_stateful.prefix.residency import FinishedTurn, Match, Residency
from vllm_stateful.prefix.residency_store import ResidencyStore
from vllm_stateful.types import Bypass, Demotion, Outcome, SessionKey


class Ask(NamedTuple):
    """The arguments of one call to ``allocate_slots``."""

    request: Request
    num_new: int
    num_computed: int
    computed: KVCacheBlocks | None
    options: dict[str, Any]


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

    called_tool: Callable[[Request], str | None]

    def become_stateful(
        self,
        *,
        pin_fraction: float,
        idle_seconds: float,
        clock: Callable[[], float],
        called_tool: Callable[[Request], str | None],
        rules: BoundaryRules | None,
    ) -> None:
        """Add the residencies' state to a manager that the stock constructor made."""
        num_blocks = self.block_pool.num_gpu_blocks
        self.store = ResidencyStore(
            block_size=self._block_size,
            num_blocks=num_blocks,
            budget_blocks=int(pin_fraction * (num_blocks - 1)),
            release=self.block_pool.free_blocks,
            clock=clock,
            rules=rules,
        )
        self.turns = {}
        self.bypassed = set()
        self.turn_counts = TurnCounts()
        self.idle_seconds = idle_seconds
        self.called_tool = called_tool
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
        used = total - self.block_pool.get_num_free_blocks() - self.store.pins.num_freeable
        return max(used, 0) / total if total else 0.0

    # ---- what is here --------------------------------------------------------------------

    def get_computed_blocks(self, request: Request) -> Computed:
        """The longest prefix of the request that is in the cache, exact to the token.

        A residency wins over vLLM's block hashes unless those reach further.
        """
        started = time.perf_counter()
        turn = self.turn_of(request)
        if turn is None:
            return self._stock_lookup(request)
        computed = self._lookup(request, turn)
        turn.lookup_s = time.perf_counter() - started
        return computed

    def estimate_cached_tokens(self, request: Request) -> int:
        """What the next turn can read: ``created_cache_tokens`` is this without what was there.

        vLLM counts full blocks; a session keeps the partly filled last one as well.
        """
        stock = int(super().estimate_cached_tokens(request))
        turn = self.turns.get(request.request_id)
        if turn is None or turn.is_closing or is_final(request) or turn.epoch != self.epoch:
            return stock
        return max(stock, int(request.num_computed_tokens - request.num_output_placeholders))

    def num_tokens_hashed(self, request_id: str) -> int:
        """Tokens of a running request in blocks that others can find by their hash."""
        return int(self._group.num_cached_block.get(request_id, 0)) * self._block_size

    def turn_of(self, request: Request) -> Turn | None:
        """The record of a request's turn; None when stock vLLM serves it."""
        turn = self.turns.get(request.request_id)
        if turn is not None:
            return turn
        reason = bypass_reason(request, self.enable_caching)
        if reason is not None:
            self._count_bypass(request, reason)
            return None
        turn = self.turns[request.request_id] = start_turn(request)
        return turn

    def _count_bypass(self, request: Request, reason: Bypass) -> None:
        if request.request_id not in self.bypassed:
            self.bypassed.add(request.request_id)
            self.turn_counts.bypassed(reason)

    def _lookup(self, request: Request, turn: Turn) -> Computed:
        turn.epoch = self.epoch
        tokens = turn.prompt
        if request.num_tokens > len(tokens):  # preempted after it had generated something
            tokens = tokens_so_far(turn, request, request.num_tokens)
        limit = request.num_tokens - 1
        match = self.store.match(turn.named, tokens, limit, turn.prompt_base)
        turn.session = match.session
        if not turn.has_arrived:
            turn.has_arrived = True
            self.store.arrived(turn.session, max(0.0, time.time() - request.arrival_time))
        turn.offer = self._offer(match, turn)
        if turn.offer is None:
            return self._stock_lookup(request)
        if self._stock_may_reach_further(request, turn.offer.num_tokens):
            stock = self._stock_lookup(request)
            if stock[1] > turn.offer.num_tokens:
                turn.offer = None
                return stock
        self._report_reuse(request, turn.offer)
        return turn.offer.blocks, turn.offer.num_tokens, 0

    def _stock_lookup(self, request: Request) -> Computed:
        computed: Computed = super().get_computed_blocks(request)
        return computed

    def _offer(self, match: Match, turn: Turn) -> Offer | None:
        """The blocks behind a match: to the exact token, or whole ones only."""
        found, num_tokens = match.residency, match.num_tokens
        if found is None:
            return None
        if turn.only_full_blocks and not self._continues_in_place(turn, found, num_tokens):
            num_tokens -= num_tokens % self._block_size
        if num_tokens == 0:
            return None
        blocks = found.blocks[: -(-num_tokens // self._block_size)]
        return Offer(KVCacheBlocks((blocks,)), found, num_tokens, match.outcome)

    def _continues_in_place(self, turn: Turn, found: Residency, num_tokens: int) -> bool:
        """Whether a turn may append where the residency ends, without a copy.

        Only a turn of the same session: a fork leaves its parent's residency where it is. Not
        when another turn does so already, and not when vLLM hashed the partly filled last block
        as full (a turn was aborted with a step in flight): others may read it then.
        """
        if not found.is_idle or num_tokens != found.frontier or found.session != turn.session:
            return False
        is_partial = num_tokens % self._block_size != 0
        return not is_partial or found.blocks[-1].block_hash is None

    def _stock_may_reach_further(self, request: Request, num_hit: int) -> bool:
        """Whether vLLM's cache holds the block after our hit: one probe instead of a walk."""
        next_block = num_hit // self._block_size
        usable_blocks = (request.num_tokens - 1) // self._block_size
        if next_block >= min(usable_blocks, len(request.block_hashes)):
            return False
        block_hash = request.block_hashes[next_block]
        return self.block_pool.get_cached_block(block_hash, [0]) is not None

    def _report_reuse(self, request: Request, offer: Offer) -> None:
        """KV events about reused blocks, for those who ask for them (``full`` reports)."""
        if self.enable_kv_cache_events and request.kv_cache_report_mode == "full":
            full = offer.residency.blocks[: offer.num_tokens // self._block_size]
            hashed = list(itertools.takewhile(lambda block: block.block_hash is not None, full))
            self.coordinator.emit_cached_block_events(request, (hashed,))

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
        ask = Ask(request, num_new_tokens, num_new_computed_tokens, new_computed_blocks, options)
        turn = self.turns.get(request.request_id)
        if turn is not None:
            turn.is_loading = bool(options.get("delay_cache_blocks"))
            if request.num_computed_tokens == 0:
                return self._admit(ask, turn)
        allocated = self._stock_allocate(ask)
        lacking = self._num_lacking(ask, 0) if allocated is None else 0
        while allocated is None and lacking is not None:
            lacking = self._demote_one(lacking)
            if lacking is not None:
                allocated = self._stock_allocate(ask)
        return allocated

    def _stock_allocate(self, ask: Ask) -> KVCacheBlocks | None:
        return super().allocate_slots(
            ask.request, ask.num_new, ask.num_computed, ask.computed, **ask.options
        )

    def _admit(self, ask: Ask, turn: Turn) -> KVCacheBlocks | None:
        """The first allocation of a turn: borrow or share what its lookup offered."""
        if turn.offer is not None and ask.computed is not turn.offer.blocks:
            turn.offer = None  # somebody replaced our answer
        started = time.perf_counter()
        allocated = self._adopt(ask, turn)
        lacking = self._num_lacking(ask, self._num_blocks_kept(turn)) if allocated is None else 0
        while allocated is None and lacking is not None:
            lacking = self._demote_one(lacking, turn)
            if lacking is not None:
                allocated = self._adopt(ask, turn)
        turn.lookup_s += time.perf_counter() - started
        if allocated is None:
            turn.only_full_blocks = turn.offer is not None
            return None
        if turn.offer is not None and turn.borrowed is None:
            self._share(turn, turn.offer)
        if not turn.is_counted:
            self._count_admission(ask, turn)
        return allocated

    def _share(self, turn: Turn, offer: Offer) -> None:
        """Its full blocks are the turn's as well; a partly filled one was copied."""
        turn.shared_ids = offer.residency.block_ids[: offer.num_tokens // self._block_size]
        self.store.pins.use(turn.shared_ids)

    def _unshare(self, turn: Turn) -> None:
        if turn.shared_ids is not None:
            self.store.pins.unuse(turn.shared_ids)
            turn.shared_ids = None

    def _adopt(self, ask: Ask, turn: Turn) -> KVCacheBlocks | None:
        offer = turn.offer
        if offer is None or not self._is_borrowing(turn, offer):
            return self._stock_allocate(ask)
        return self._allocate_borrowing(ask, turn, offer)

    def _is_borrowing(self, turn: Turn, offer: Offer) -> bool:
        """Not while KV is loaded behind the offer: a load that fails must not cost the session."""
        if turn.is_loading:
            return False
        return self._continues_in_place(turn, offer.residency, offer.num_tokens)

    def _allocate_borrowing(self, ask: Ask, turn: Turn, offer: Offer) -> KVCacheBlocks | None:
        """Move the residency's block list to the request, and append to it."""
        group, request_id = self._group, ask.request.request_id
        group.req_to_blocks[request_id] = self.store.borrow(offer.residency, request_id)
        group.num_cached_block[request_id] = offer.num_tokens // self._block_size
        allocated = self._stock_allocate(ask._replace(computed=None))
        if allocated is None:
            del group.req_to_blocks[request_id]
            del group.num_cached_block[request_id]
            self.store.give_back(offer.residency)
        else:
            turn.borrowed = offer.residency
        return allocated

    def _num_blocks_kept(self, turn: Turn) -> int:
        """Idle blocks that stay out of the pool because the turn will borrow them."""
        offer = turn.offer
        if offer is None or not self._is_borrowing(turn, offer):
            return 0
        return len(offer.residency.blocks)

    def _num_lacking(self, ask: Ask, num_kept: int) -> int | None:
        """How many blocks a refused request lacks; None when all pins together could not help.

        Args:
            ask: what was refused.
            num_kept: idle blocks that the request itself would borrow.
        """
        request, options = ask.request, ask.options
        num_tokens = request.num_computed_tokens + ask.num_computed + ask.num_new
        num_tokens += options.get("num_external_computed_tokens", 0)
        if options.get("full_sequence_must_fit"):
            num_tokens = max(num_tokens, request.num_tokens)
        held = len(self._group.req_to_blocks.get(request.request_id, ())) + num_kept
        if num_kept == 0 and ask.computed is not None:
            held += sum(1 for block in ask.computed.blocks[0] if block.ref_cnt > 0)
        needed = -(-min(num_tokens, self.max_model_len) // self._block_size) - held
        num_free = self.block_pool.get_num_free_blocks()
        if needed > num_free + self.store.pins.num_freeable - num_kept:
            return None
        return int(needed - num_free)

    def _demote_one(self, lacking: int, turn: Turn | None = None) -> int | None:
        """How many of so many blocks are lacking after that; None when nobody is left to give.

        The one that the turn builds on goes last, and not at all when the turn continues it in
        place: then it needs no block that stock vLLM would not need.
        """
        offer = None if turn is None else turn.offer
        base = None if offer is None else offer.residency
        before: int = self.block_pool.get_num_free_blocks()
        if self.store.demote_next(Demotion.PRESSURE, max(1, lacking), keep=base) is not None:
            return lacking - self._num_freed_since(before)
        if turn is None or offer is None or not offer.residency.is_idle:
            return None
        if self._is_borrowing(turn, offer):
            return None
        self.store.demote(offer.residency, Demotion.PRESSURE)
        return lacking - self._num_freed_since(before)

    def _num_freed_since(self, before: int) -> int:
        return int(self.block_pool.get_num_free_blocks()) - before

    def _count_admission(self, ask: Ask, turn: Turn) -> None:
        turn.is_counted = True
        num_loaded = ask.options.get("num_external_computed_tokens", 0)
        outcome = Outcome.COLD if turn.offer is None else turn.offer.outcome
        outcome = Outcome.RESTORED if num_loaded else outcome
        num_reused = ask.num_computed + num_loaded
        self.turn_counts.admitted(outcome, num_reused, ask.request.num_prompt_tokens)
        if turn.offer is not None:
            self.turn_counts.resumed_after(turn.lookup_s)
        if turn.offer is not None and outcome is Outcome.DIVERGED:
            _, residency, num_tokens, _ = turn.offer
            self.turn_counts.edited(self.store.kind_at(residency, num_tokens).name.lower())

    # ---- keep it -------------------------------------------------------------------------

    def free(self, request: Request) -> None:
        """Keep a finished turn's blocks with its session; free those of any other request."""
        if not request.is_finished():
            self._free_preempted(request)
            return
        self.bypassed.discard(request.request_id)
        turn = self.turns.pop(request.request_id, None)
        if turn is not None:
            self._unshare(turn)
        if turn is not None and self._is_worth_keeping(request, turn):
            self._keep(request, turn)
            return
        if turn is not None:
            self._forfeit(turn, self._why_not_kept(request, turn))
        super().free(request)

    def _is_worth_keeping(self, request: Request, turn: Turn) -> bool:
        if is_final(request):
            turn.is_closing = True
            self.store.close(turn.session)
        return not (turn.is_closing or _has_failed(request, turn) or turn.epoch != self.epoch)

    def _why_not_kept(self, request: Request, turn: Turn) -> Demotion:
        if turn.is_closing:
            return Demotion.CLOSED
        return Demotion.ERROR if _has_failed(request, turn) else Demotion.RESET

    def _free_preempted(self, request: Request) -> None:
        self.preempted(request)
        super().free(request)

    def preempted(self, request: Request) -> None:
        """A preempted turn loses its blocks, as in stock vLLM, and looks up again later."""
        turn = self.turns.get(request.request_id)
        if turn is not None:
            turn.is_loading = False
            self._unshare(turn)
            self._forfeit(turn, Demotion.PREEMPTED)

    def _forfeit(self, turn: Turn, why: Demotion) -> None:
        if turn.borrowed is not None:
            self.store.forfeit(turn.borrowed, why)
        turn.borrowed = turn.offer = None

    def _keep(self, request: Request, turn: Turn) -> None:
        """Hand the turn's blocks to a residency, up to the last token that is sure.

        Drafts that were accepted and then trimmed by a stop, or not yet verified when the client
        went away, count as computed but are no tokens of the request: hence the ``min``.
        """
        frontier = request.num_computed_tokens - request.num_output_placeholders
        frontier = min(frontier, request.num_tokens)
        if frontier > 0:
            self.cache_blocks(request, frontier)  # blocks that accepted drafts filled
        blocks = self.pop_blocks_for_free(request)
        num_kept = -(-frontier // self._block_size)
        self.block_pool.free_blocks(reversed(blocks[num_kept:]))
        if frontier <= 0:
            return
        made = self.store.finish(
            FinishedTurn(
                session=turn.session,
                prompt=turn.prompt,
                output=output_array(request),
                frontier=frontier,
                blocks=blocks[:num_kept],
                borrowed=turn.borrowed,
                base=None if turn.offer is None else turn.offer.residency,
                num_base_tokens=0 if turn.offer is None else turn.offer.num_tokens,
                version=turn.version,
                tool=forced_tool(request) or self.called_tool(request),
                wish_s=retention_wish(request) or 0.0,
            )
        )
        if made is not None and len(made.blocks) > self.store.pins.budget_blocks:
            self.store.demote(made, Demotion.BUDGET)  # rather than all others, then this one
        self.store.enforce_budget()

    # ---- drop it -------------------------------------------------------------------------

    def reset_prefix_cache(self) -> bool:
        """Drop every residency, then reset as vLLM does. Running turns will not be kept."""
        self.epoch += 1
        self.store.reset()
        return bool(super().reset_prefix_cache())

    def close_session(self, session_id: str, cache_salt: str | None) -> int:
        """Release what a session keeps; turns of it that still run will keep nothing either.

        Args:
            session_id: as the engine was told.
            cache_salt: as the engine was told; sessions of other tenants stay. The same id
                under several LoRA adapters is closed under all of them.

        Returns:
            The number of branches that were dropped, running turns included.
        """

        def is_meant(session: SessionKey) -> bool:
            return session.session_id == session_id and session.identity.cache_salt == cache_salt

        running = [turn for turn in self.turns.values() if is_meant(turn.session)]
        for turn in running:
            turn.is_closing = True
        sessions = [session for session in self.store.sessions() if is_meant(session)]
        return len(running) + sum(self.store.close(session) for session in sessions)

    def new_step_starts(self) -> None:
        """Called by the scheduler at the start of each step; ends idle sessions."""
        self.store.expire(self.idle_seconds)
        super().new_step_starts()


def _has_failed(request: Request, turn: Turn) -> bool:
    """Whether its KV may be wrong: an error ended it, or while KV was still being loaded."""
    return request.status == RequestStatus.FINISHED_ERROR or turn.is_loading
