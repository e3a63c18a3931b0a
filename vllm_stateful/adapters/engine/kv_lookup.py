# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV cache manager, first part: find what is here of a prompt.

The hit is the longest prefix at which some residency lets a turn continue, exact to the token.
vLLM's own block hashes win where they reach further.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from vllm_stateful.adapters.engine.kv_groups import RequestTables, in_place
from vllm_stateful.adapters.engine.loads import Computed, Loads
from vllm_stateful.adapters.engine.resume_points import ResumePoints
from vllm_stateful.adapters.engine.running_states import RunningStates
from vllm_stateful.adapters.engine.turn import (
    Offer,
    Turn,
    bypass_reason,
    is_final,
    start_turn,
    tokens_so_far,
)
from vllm_stateful.adapters.engine.turn_records import TurnRecords
from vllm_stateful.observe.turn_counts import TurnCounts
from vllm_stateful.prefix.boundaries import BoundaryRules, Kind
from vllm_stateful.prefix.groups import Group
from vllm_stateful.prefix.groups.table import Blocks
from vllm_stateful.prefix.residency import Match, Residency
from vllm_stateful.prefix.residency_book import MAX_POINTS
from vllm_stateful.prefix.residency_store import ResidencyStore
from vllm_stateful.types import Bypass, Demotion, TokenArray


class KVLookup(KVCacheManager):  # type: ignore[misc]
    """A ``KVCacheManager`` that looks prompts up in residencies."""

    store: ResidencyStore
    turns: dict[str, Turn]
    bypassed: set[str]
    lookahead: int
    """The number of tokens behind a position that must be the same, because what is kept depends on
    them."""
    num_hashed_ahead: int
    """The number of tokens behind a block that its hash covers, too."""
    turn_counts: TurnCounts
    idle_seconds: float
    epoch: int
    running_states: RunningStates
    are_answers_read: bool
    """Whether resume points are left inside answers."""
    resume_points: ResumePoints
    request_tables: RequestTables

    loads: Loads | None
    """The loads of the KV connector; None without one."""
    called_tool: Callable[[Request], str | None]
    records: TurnRecords | None = None
    """The records of turns; None with ``--stateful-explain off``."""

    def become_stateful(
        self,
        *,
        pin_fraction: float,
        idle_seconds: float,
        clock: Callable[[], float],
        called_tool: Callable[[Request], str | None],
        rules: BoundaryRules | None,
        groups: Sequence[Group],
        max_points: int = MAX_POINTS,
        lookahead: int = 0,
        num_hashed_ahead: int = 0,
        num_drafts: int = 0,
        is_step_known: bool = False,
        loads: Loads | None = None,
    ) -> None:
        """Add the residencies' state to a manager that the stock constructor made."""
        num_blocks = self.block_pool.num_gpu_blocks
        self.groups = tuple(groups)
        self.lookahead = lookahead
        self.num_hashed_ahead = num_hashed_ahead
        full = [place for place, group in enumerate(groups) if group.is_full]
        self._first_full = full[0] if full else None
        self.store = ResidencyStore(
            block_size=groups[full[0] if full else 0].block_size,
            num_blocks=num_blocks,
            budget_blocks=int(pin_fraction * (num_blocks - 1)),
            release=self.block_pool.free_blocks,
            clock=clock,
            rules=rules,
            groups=[replace(group, lookahead=lookahead) for group in groups],
            max_points=max_points,
        )
        self.request_tables = RequestTables(self.coordinator, groups)
        self.resume_points = ResumePoints(
            self.coordinator, groups, rules, self._make_room, lookahead
        )
        self.loads = loads
        self.turns = {}
        self.bypassed = set()
        self.turn_counts = TurnCounts()
        self.idle_seconds = idle_seconds
        self.called_tool = called_tool
        self.epoch = 0
        self.expect_drafts(num_drafts, is_step_known)

    def expect_drafts(self, num: int, is_step_known: bool) -> None:
        """Set how many drafts of one request a step may verify (see `RunningStates`)."""
        states = RunningStates(self.groups, num, is_step_known=is_step_known)
        self.running_states = states
        is_read = self.store.has_points and self.resume_points.knows_markers
        self.are_answers_read = is_read and states.are_known_in_answers

    @property
    def _managers(self) -> Any:
        return self.coordinator.single_type_managers

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1; pinned blocks count as free."""
        total = self.block_pool.num_gpu_blocks - 1
        used = total - self.block_pool.get_num_free_blocks() - self.store.pins.num_freeable
        return max(used, 0) / total if total else 0.0

    # ---- what is here --------------------------------------------------------------------

    def get_computed_blocks(self, request: Request, *limit: int | None) -> Computed:
        """The longest prefix of the request that is in the cache, exact to the token.

        A residency wins over vLLM's block hashes unless those reach further.

        Args:
            request: vLLM's.
            limit: the longest hit that is wanted, in tokens, from vLLM 0.33 on. Only requests whose
                auxiliary outputs are kept have a limit, and for those the plugin is off.
        """
        if any(most is not None for most in limit):
            computed: Computed = super().get_computed_blocks(request, *limit)
            return computed
        started = time.perf_counter()
        turn = self.turn_of(request)
        if turn is None:
            return self._settled(request, self._stock_lookup(request))
        computed = self._settled(request, self._lookup(request, turn))
        turn.lookup_s = time.perf_counter() - started
        return computed

    def _settled(self, request: Request, ours: Computed) -> Computed:
        """Our hit, or a shorter one if a KV connector that loads behind it then reaches further."""
        if self.loads is None:
            return ours
        return self.loads.settle(request, ours, self.truncate_computed_blocks)

    def read_loads(self, output: KVConnectorOutput | None) -> None:
        """Read which blocks a step could not load; call before vLLM reads them."""
        has_lost = output is not None and bool(output.invalid_block_ids)
        # With several groups vLLM has no answer, and raises. No connector that is on reports any.
        if self.loads is not None and has_lost and len(self.groups) == 1:
            self.loads.fail(output, self.turns, self._managers[0].req_to_blocks)

    def estimate_cached_tokens(self, request: Request) -> int:
        """The number of tokens that the next turn can read from the cache.

        ``created_cache_tokens`` is this number without what was there before. vLLM counts full
        blocks; a session keeps the partly filled last block as well.
        """
        stock = int(super().estimate_cached_tokens(request))
        turn = self.turns.get(request.request_id)
        if turn is None or turn.is_closing or is_final(request) or turn.epoch != self.epoch:
            return stock
        return max(stock, int(request.num_computed_tokens - request.num_output_placeholders))

    def num_tokens_hashed(self, request_id: str) -> int:
        """The number of a running request's tokens in blocks that others can find by their hash."""
        return min(
            int(manager.num_cached_block.get(request_id, 0)) * int(manager.block_size)
            for manager in self._managers
        )

    def turn_of(self, request: Request) -> Turn | None:
        """The turn of a request; None when stock vLLM serves it."""
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
            if self.records is not None:
                self.records.bypassed(request, reason)

    def _lookup(self, request: Request, turn: Turn) -> Computed:
        turn.epoch = self.epoch
        tokens = turn.prompt
        if request.num_tokens > len(tokens):  # preempted after it had generated tokens
            tokens = tokens_so_far(turn, request, request.num_tokens)
        limit = request.num_tokens - 1 + self.lookahead
        match = self.store.match(turn.named, tokens, limit, turn.prompt_base)
        turn.session = match.session
        if not turn.has_arrived:
            turn.has_arrived = True
            turn.is_beside = self.store.is_beside(turn.session, turn.shape)
            ago_s = max(0.0, time.time() - request.arrival_time)
            if not turn.is_beside:
                turn.waited = self.store.arrived(turn.session, ago_s)
        turn.related = (match.related, match.num_shared) if match.related else None
        if self.records is not None:
            turn.nearest = self._nearest(turn, tokens[:limit])
        turn.offer = self._offer(match, turn)
        if turn.offer is None:
            return self._stock_lookup(request, turn, match)
        if self._stock_may_reach_further(request, turn.offer.num_tokens):
            stock = self._stock_lookup(request, turn, match)
            if stock[1] > turn.offer.num_tokens:
                turn.offer = None
                return stock
        if self.store.has_points:
            self._plan(turn, match, turn.offer.num_tokens)
        self._report_reuse(request, turn.offer)
        return turn.offer.blocks, turn.offer.num_tokens, 0

    def _stock_lookup(
        self, request: Request, turn: Turn | None = None, match: Match | None = None
    ) -> Computed:
        computed: Computed = super().get_computed_blocks(request)
        if turn is not None and match is not None and self.store.has_points:
            self._plan(turn, match, computed[1])
        return computed

    def _plan(self, turn: Turn, match: Match, start: int) -> None:
        before = Kind.OTHER
        if match.related is not None and 0 < start <= match.num_shared:
            before = self.store.kind_at(match.related, start - 1)
        self.resume_points.plan(turn, match, start, before)

    def _nearest(self, turn: Turn, tokens: TokenArray) -> tuple[Residency, int] | None:
        """The history with which a turn is compared for people, and the number of shared tokens.

        It is the session's own, even if another session shares more: many begin with one system
        message.
        """
        related = turn.related
        if related is not None and related[0].session == turn.session:
            return related
        return self.store.nearest_own(turn.session, tokens) or related

    def _offer(self, match: Match, turn: Turn) -> Offer | None:
        """The offer of a match's blocks: to the exact token, or whole blocks only."""
        found, num_tokens = match.residency, match.num_tokens - self.lookahead
        if found is None or num_tokens <= 0:
            return None
        offer = Offer(self.empty_kv_cache_blocks, found, num_tokens, match.outcome, match.point)
        if turn.only_full_blocks and not self._continues_in_place(turn, offer):
            if self.store.has_points:
                return None
            num_tokens -= num_tokens % self.store.block_size
        if num_tokens == 0:
            return None
        return offer._replace(blocks=self._blocks_of(offer, num_tokens), num_tokens=num_tokens)

    def _blocks_of(self, offer: Offer, num_tokens: int) -> KVCacheBlocks:
        """The blocks of all groups with which a turn continues at a position."""
        tables: list[Blocks] = []
        for place, (group, table) in enumerate(
            zip(self.groups, offer.residency.tables, strict=True)
        ):
            if group.is_full:
                tables.append(table.blocks[: group.end(num_tokens)])
            else:
                assert offer.point is not None
                tables.append(in_place(offer.point.tables[place], self.block_pool.null_block))
        return KVCacheBlocks(tuple(tables))

    def _continues_in_place(self, turn: Turn, offer: Offer) -> bool:
        """Whether a turn may append where the residency ends, without a copy.

        Only a turn of the same session may: a fork leaves its parent's residency where it is. It
        may not when another turn already does so. Nor may it when vLLM hashed a partly filled last
        block as full (a turn was aborted with a step in flight): others may read that block then.
        """
        found, num_tokens = offer.residency, offer.num_tokens
        is_at_end = num_tokens + self.lookahead == found.frontier
        if not found.is_idle or not is_at_end or found.session != turn.session:
            return False
        held = offer.point.tables if offer.point is not None else found.tables
        for group, full, table in zip(self.groups, found.tables, held, strict=True):
            blocks = (full if group.is_full else table).blocks
            if num_tokens % group.block_size == 0 or not blocks:
                continue
            if blocks[-1].block_hash is not None:
                return False
            if group.is_state and blocks[-1].ref_cnt != 1:  # another holds this state
                return False
        return True

    def _stock_may_reach_further(self, request: Request, num_hit: int) -> bool:
        """Whether vLLM's cache holds the block after our hit: one probe, not a lookup."""
        if self._first_full is None:
            return True
        size, hash_size = self.store.block_size, self.block_pool.hash_block_size
        next_block = num_hit // size
        usable_blocks = (request.num_tokens - 1) // size
        if next_block >= min(usable_blocks, len(request.block_hashes) * hash_size // size):
            return False
        hashes = resolve_block_hashes(
            request.block_hashes,
            hash_size,
            size,
            supports_fine_grained_hash_lookup=False,
            alignment_tokens=size,
        )
        found = self.block_pool.get_cached_block(hashes[next_block], [self._first_full])
        return found is not None

    def _report_reuse(self, request: Request, offer: Offer) -> None:
        """Emit KV events about reused blocks, if the request asks for them (``full`` reports)."""
        if self.enable_kv_cache_events and request.kv_cache_report_mode == "full":
            hashed = []
            for group, blocks in zip(self.groups, offer.blocks.blocks, strict=True):
                whole = blocks[: offer.num_tokens // group.block_size] if group.is_full else ()
                hashed.append(
                    list(itertools.takewhile(lambda block: block.block_hash is not None, whole))
                )
            self.coordinator.emit_cached_block_events(request, tuple(hashed))

    def _make_room(self, num_wanted: int) -> bool:
        """Demote idle residencies for ``num_wanted`` free blocks; whether so many are free."""
        while self.block_pool.get_num_free_blocks() < num_wanted:
            if self.store.demote_next(Demotion.PRESSURE, num_wanted) is None:
                return False
        return True
