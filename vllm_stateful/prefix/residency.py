# SPDX-License-Identifier: Apache-2.0
"""Residencies: the KV that finished turns left in the block pool, and who may continue it.

A residency is an immutable fact: "these blocks hold the KV of exactly these tokens". Its last
block may be partly filled; what lies behind the frontier is nobody's, so one turn at a time may
append there in place while every other reader still sees what it was promised.

The store owns one reference on each block of an *idle* residency. A turn that continues at the
frontier *borrows* it: reference and block list move to the turn, nothing is touched or copied,
and the turn gives both back, grown, when it ends. All other readers (forks, edits, parallel
turns) share: they take references of their own and copy the last block on write.

Source: arXiv:2605.26289 (persistent per-session KV, metadata-only aliasing).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vllm_stateful.prefix.pins import PinLedger
from vllm_stateful.prefix.token_index import TokenIndex, common_prefix_len
from vllm_stateful.schedule.fairness import FairQueue
from vllm_stateful.schedule.gaps import Forecast, Wait, WaitKind
from vllm_stateful.schedule.retention import Worth
from vllm_stateful.schedule.waits import WaitBook
from vllm_stateful.types import BlockIds, Demotion, Identity, Outcome, SessionKey, TokenArray

MIN_SHARED_TOKENS = 16
"""A shorter common prefix (a template's opening) is no fork: copying a block costs more."""

MAX_BRANCHES = 4
"""Residencies kept under one session id: parallel sub-agents often share their root's id."""

ANONYMOUS = "anonymous-"
"""Prefix of the ids given to sessions that no client named."""

Blocks = list[Any]
"""Block handles in sequence order; opaque here, vLLM's ``KVCacheBlock`` in production."""


def is_anonymous(session: SessionKey) -> bool:
    """Whether no client named this session."""
    return session.session_id.startswith(ANONYMOUS)


@dataclass(eq=False, slots=True)
class Residency:
    """The KV of one finished turn."""

    session: SessionKey
    tokens: TokenArray
    """Shape ``[frontier]``: the tokens whose KV is computed."""
    blocks: Blocks
    """``ceil(frontier / block_size)`` handles; grows in place while a turn borrows it."""
    block_ids: BlockIds
    forecast: Forecast
    """When its session is expected back."""
    num_turns: int = 1
    borrower: str | None = None
    """The request that continues this residency in place, or None while it is idle."""
    superseded: bool = False
    alive: bool = True

    @property
    def frontier(self) -> int:
        return len(self.tokens)

    @property
    def is_idle(self) -> bool:
        """Whether the store owns its blocks: neither lent nor dropped."""
        return self.alive and self.borrower is None

    @property
    def worth(self) -> Worth:
        return Worth.SUPERSEDED if self.superseded else Worth.LIVE


class Match(NamedTuple):
    """What a new turn can reuse."""

    session: SessionKey
    outcome: Outcome
    residency: Residency | None
    num_tokens: int


@dataclass(slots=True)
class FinishedTurn:
    """What a turn leaves behind."""

    session: SessionKey
    tokens: TokenArray
    blocks: Blocks
    borrowed: Residency | None = None
    base: Residency | None = None
    """The residency it started from, borrowed or shared."""
    num_base_tokens: int = 0
    tool: str | None = None
    """The tool that its answer calls; empty when its name is not known, None without a call."""


class ResidencyStore:
    """All residencies of one engine core. Not thread-safe: owned by the scheduler's thread.

    Args:
        block_size: tokens per block.
        num_blocks: blocks in the pool, the null block included.
        budget_blocks: most distinct blocks that idle residencies may hold.
        release: returns blocks to the pool; called with blocks in eviction order (tail first).
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        block_size: int,
        num_blocks: int,
        budget_blocks: int,
        release: Callable[[Iterable[Any]], None],
        clock: Callable[[], float],
    ) -> None:
        self.block_size = block_size
        self.pins = PinLedger(num_blocks, budget_blocks)
        self.demotions = dict.fromkeys(Demotion, 0)
        self._release = release
        self._clock = clock
        self._indexes: dict[Identity, TokenIndex[Residency]] = {}
        self._sessions: dict[SessionKey, list[Residency]] = {}
        self._idle: FairQueue[Residency] = FairQueue()
        self.waits = WaitBook()

    # ---- looking -------------------------------------------------------------------------

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def num_residencies(self) -> int:
        return sum(len(branches) for branches in self._sessions.values())

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def residencies(self) -> list[Residency]:
        return [found for branches in self._sessions.values() for found in branches]

    def sessions(self) -> list[SessionKey]:
        return list(self._sessions)

    def branches(self, session: SessionKey) -> tuple[Residency, ...]:
        return tuple(self._sessions.get(session, ()))

    def match(self, session: SessionKey, tokens: TokenArray, limit: int) -> Match:
        """Find what a turn can reuse. Read-only.

        Args:
            session: its identity must equal that of the residency; its id is a hint that
                breaks ties. An anonymous id is replaced by that of the session it continues.
            tokens: the prompt, shape ``[num_tokens]``.
            limit: most tokens that may be reused (vLLM must compute at least the last one).
        """
        index = self._indexes.get(session.identity)
        wanted = tokens[:limit]
        num_tokens, found = index.match(wanted) if index is not None else (0, None)
        if found is None or num_tokens < min(MIN_SHARED_TOKENS, found.frontier, limit):
            return Match(session, Outcome.COLD, None, 0)
        own = self._own_branch(session, wanted[:num_tokens])
        if own is not None:
            found, num_tokens = own, min(own.frontier, num_tokens)
        return self._classify(session, found, num_tokens, limit)

    def _own_branch(self, session: SessionKey, shared: TokenArray) -> Residency | None:
        """The session's own branch, unless somebody else's saves a whole block more.

        A fork computes its parent's last sampled token first, so it often matches one token
        further; that is no reason to leave one's own session.
        """
        least = len(shared) - self.block_size + 1
        for branch in sorted(self.branches(session), key=lambda branch: branch.frontier):
            if branch.frontier < least:
                continue
            common = shared[: branch.frontier]
            if np.array_equal(branch.tokens[: len(common)], common):
                return branch
        return None

    @staticmethod
    def _classify(session: SessionKey, found: Residency, num_tokens: int, limit: int) -> Match:
        whole = num_tokens == min(found.frontier, limit)
        if whole and is_anonymous(session) and is_anonymous(found.session):
            session = found.session
        if session != found.session:
            return Match(session, Outcome.FORKED, found, num_tokens)
        outcome = Outcome.RESUMED if whole else Outcome.DIVERGED
        return Match(session, outcome, found, num_tokens)

    # ---- one turn ------------------------------------------------------------------------

    def arrived(self, session: SessionKey, seconds_ago: float = 0.0) -> None:
        """A turn of the session came in: what its gap teaches. Once per turn."""
        self.waits.came_back(session, self._clock() - seconds_ago)

    def borrow(self, residency: Residency, request_id: str) -> Blocks:
        """Hand the block list and its references to a turn that appends at the frontier."""
        assert residency.alive
        assert residency.borrower is None
        residency.borrower = request_id
        self._idle.discard(residency)
        self.pins.unpin(residency.block_ids)
        return residency.blocks

    def give_back(self, residency: Residency) -> None:
        """Undo ``borrow`` before the turn appended anything (its allocation was refused)."""
        assert residency.alive
        assert residency.borrower is not None
        residency.borrower = None
        self._park(residency)

    def forfeit(self, residency: Residency, why: Demotion) -> None:
        """Forget a borrowed residency; its blocks stay with the borrower, who frees them."""
        assert residency.borrower is not None
        if residency.alive:
            self._forget(residency)
            self.demotions[why] += 1

    def finish(self, turn: FinishedTurn) -> Residency | None:
        """Keep what a turn computed, in place of what it makes redundant.

        Takes over one reference per block of ``turn.blocks``, exactly
        ``ceil(len(tokens) / block_size)`` of them.

        Returns:
            The new residency; None when an existing one of the session already covers it.
        """
        assert len(turn.blocks) == -(-len(turn.tokens) // self.block_size)
        num_turns = 1 if turn.borrowed is None else turn.borrowed.num_turns + 1
        if turn.borrowed is not None and turn.borrowed.alive:
            self._forget(turn.borrowed)
        forecast = self._expect(turn, num_turns)
        if self._is_covered(turn, forecast):
            self._release(reversed(turn.blocks))
            return None
        self._mark_superseded(turn)
        self._make_room(turn)
        ids = self._block_ids(turn)
        made = Residency(turn.session, turn.tokens, turn.blocks, ids, forecast, num_turns)
        self._sessions.setdefault(turn.session, []).append(made)
        self._indexes.setdefault(turn.session.identity, TokenIndex()).insert(made.tokens, made)
        self._park(made)
        return made

    def _expect(self, turn: FinishedTurn, num_turns: int) -> Forecast:
        """When the session is expected back."""
        kind = WaitKind.USER if turn.tool is None else WaitKind.TOOL
        if num_turns == 1 and is_anonymous(turn.session):
            kind = WaitKind.ONE_SHOT
        wait = Wait(kind, turn.tool or "", num_turns)
        tenant = turn.session.identity.cache_salt
        return self.waits.began(turn.session, tenant, wait, self._clock())

    @staticmethod
    def _block_ids(turn: FinishedTurn) -> BlockIds:
        """The ids of the turn's blocks; those that it borrowed are known already."""
        known = np.empty(0, np.int32) if turn.borrowed is None else turn.borrowed.block_ids
        new = turn.blocks[len(known) :]
        return np.concatenate([known, np.fromiter((b.block_id for b in new), np.int32, len(new))])

    def _mark_superseded(self, turn: FinishedTurn) -> None:
        """An edit kills the branch it rewrote; a short common prefix is only a sibling."""
        base = turn.base
        if base is None or base is turn.borrowed or not base.alive:
            return
        edited = turn.num_base_tokens < base.frontier <= 2 * turn.num_base_tokens
        if base.session == turn.session and edited:
            base.superseded = True
            self._idle.supersede(base)

    def _is_covered(self, turn: FinishedTurn, forecast: Forecast) -> bool:
        """Whether a branch of the session holds all that the turn computed (a repeated turn)."""
        for branch in self.branches(turn.session):
            if common_prefix_len(branch.tokens, turn.tokens) == len(turn.tokens):
                branch.forecast = forecast
                if branch.is_idle:
                    self._enter(branch)
                return True
        return False

    def _make_room(self, turn: FinishedTurn) -> None:
        """Drop the branches that the turn covers, and the least worthy beyond the limit."""
        idle = [branch for branch in self.branches(turn.session) if branch.is_idle]
        for branch in [*idle]:
            if common_prefix_len(branch.tokens, turn.tokens) == branch.frontier:
                self.demote(branch, Demotion.SUPERSEDED)
                idle.remove(branch)
        idle.sort(key=lambda branch: branch.worth)
        while len(idle) >= MAX_BRANCHES:
            self.demote(idle.pop(0), Demotion.SUPERSEDED)

    # ---- giving blocks back --------------------------------------------------------------

    def demote(self, residency: Residency, why: Demotion) -> int:
        """Return an idle residency's blocks to the pool, tail first.

        Full blocks stay findable by vLLM's own prefix cache until they are reused.

        Returns:
            The number of blocks that no idle residency holds any longer.
        """
        assert residency.borrower is None
        before = self.pins.num_pinned
        self._forget(residency)
        self.pins.unpin(residency.block_ids)
        self._release(reversed(residency.blocks))
        self.demotions[why] += 1
        return before - self.pins.num_pinned

    def demote_next(self, why: Demotion, keep: Residency | None = None) -> int | None:
        """Demote the least valuable idle residency; None when there is none but ``keep``."""
        victim = self._idle.next_victim(self._clock(), keep)
        return None if victim is None else self.demote(victim, why)

    def enforce_budget(self) -> None:
        """Demote until the pinned blocks fit their budget."""
        while self.pins.over_budget:
            if self.demote_next(Demotion.BUDGET) is None:
                return

    def expire(self, idle_s: float) -> None:
        """Demote what was not used for ``idle_s`` seconds."""
        for residency in self._idle.expired(self._clock() - idle_s):
            self.demote(residency, Demotion.IDLE)

    def close(self, session: SessionKey) -> int:
        """Demote all idle branches of a session. Returns how many there were."""
        idle = [branch for branch in self.branches(session) if branch.is_idle]
        for branch in idle:
            self.demote(branch, Demotion.CLOSED)
        self.waits.closed(session)
        return len(idle)

    def reset(self) -> None:
        """Drop everything; borrowed blocks stay with their turns."""
        for residency in self.residencies():
            if residency.borrower is None:
                self.demote(residency, Demotion.RESET)
            else:
                self._forget(residency)
                self.demotions[Demotion.RESET] += 1

    # ---- bookkeeping ---------------------------------------------------------------------

    def _park(self, residency: Residency) -> None:
        self.pins.pin(residency.block_ids)
        self._enter(residency)

    def _enter(self, residency: Residency) -> None:
        self._idle.add(
            residency,
            tenant=residency.session.identity.cache_salt,
            num_blocks=len(residency.blocks),
            worth=residency.worth,
            forecast=residency.forecast,
            now_s=self._clock(),
        )

    def _forget(self, residency: Residency) -> None:
        residency.alive = False
        self._idle.discard(residency)
        branches = self._sessions[residency.session]
        branches.remove(residency)
        if not branches:
            del self._sessions[residency.session]
        index = self._indexes[residency.session.identity]
        index.remove(residency)
        if not len(index):
            del self._indexes[residency.session.identity]
