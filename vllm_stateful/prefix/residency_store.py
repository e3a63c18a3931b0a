# SPDX-License-Identifier: Apache-2.0
"""Who may continue which residency, and what becomes of it.

The store owns one reference on each block of an *idle* residency. A turn that continues at the
frontier *borrows* it: reference and block list move to the turn, nothing is touched or copied,
and the turn gives both back, grown, when it ends. All other readers (forks, edits, parallel
turns) share: they take references of their own and copy the last block on write.

Source: arXiv:2605.26289 (persistent per-session KV, metadata-only aliasing).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import numpy as np

from vllm_stateful.prefix.boundaries import BoundaryRules, Cuts, Kind
from vllm_stateful.prefix.edits import end_of_question, is_found_in
from vllm_stateful.prefix.pins import PinLedger
from vllm_stateful.prefix.radix_tree import NO_CUTS, Known, PrefixMatch, RadixTree
from vllm_stateful.prefix.reasoning import ReasoningHabits, reasoning_of
from vllm_stateful.prefix.residency import (
    Blocks,
    FinishedTurn,
    Match,
    OffloadTier,
    PromptBase,
    Residency,
    is_anonymous,
)
from vllm_stateful.schedule.fairness import FairQueue
from vllm_stateful.schedule.gaps import Forecast, Wait
from vllm_stateful.schedule.waits import WaitBook
from vllm_stateful.types import BlockIds, Demotion, Identity, Outcome, SessionKey, TokenArray

MIN_SHARED_TOKENS = 16
"""A shorter common prefix (a template's opening) is no fork: copying a block costs more."""

MIN_GIVEN_TOKENS = 256
"""A residency that gives up some of its end gives at least so many tokens."""

WISHED_SHARE = 0.5
"""Wishes of clients count up to this share of the budget."""

LOOK_BACK = 64
"""Tokens before a position that say what begins behind it (``BoundaryRules.cuts``)."""

MAX_BRANCHES = 4
"""Residencies kept under one session id: parallel sub-agents often share their root's id."""


class ResidencyStore:
    """All residencies of one engine core. Not thread-safe: owned by the scheduler's thread.

    Args:
        block_size: tokens per block.
        num_blocks: blocks in the pool, the null block included.
        budget_blocks: most distinct blocks that idle residencies may hold.
        release: returns blocks to the pool; called with blocks in eviction order (tail first).
        clock: seconds, monotonic.
        rules: where messages begin in token ids; None when that is not known.
    """

    def __init__(
        self,
        block_size: int,
        num_blocks: int,
        budget_blocks: int,
        release: Callable[[Iterable[Any]], None],
        clock: Callable[[], float],
        rules: BoundaryRules | None = None,
    ) -> None:
        self.block_size = block_size
        self.pins = PinLedger(num_blocks, budget_blocks)
        self.demotions = dict.fromkeys(Demotion, 0)
        self._release = release
        self._clock = clock
        self._trees: dict[Identity, RadixTree[Residency]] = {}
        self._of_version: dict[Hashable, Residency] = {}
        self._sessions: dict[SessionKey, list[Residency]] = {}
        self._idle: FairQueue[Residency] = FairQueue(budget_blocks * WISHED_SHARE)
        self.waits = WaitBook()
        self.tier: OffloadTier | None = None
        """Told of each session that waits or is over."""
        self.num_reasoning_dropped = 0
        """Tokens of reasoning, and behind it, that were not kept."""
        self._rules = rules
        self._habits = ReasoningHabits()

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

    def kind_at(self, residency: Residency, position: int) -> Kind:
        """The kind of the segment that a token of a residency lies in; OTHER when it is gone."""
        if not residency.alive:
            return Kind.OTHER
        for node in residency.tree.path_up(residency):
            if node.start <= position:
                return Kind(node.kind)
        return Kind.OTHER

    def branches(self, session: SessionKey) -> tuple[Residency, ...]:
        return tuple(self._sessions.get(session, ()))

    def match(
        self, session: SessionKey, tokens: TokenArray, limit: int, base: PromptBase | None = None
    ) -> Match:
        """Find what a turn can reuse. Read-only.

        Args:
            session: its identity must equal that of the residency; its id is a hint that
                breaks ties. An anonymous id is replaced by that of the session it continues.
            tokens: the prompt, shape ``[num_tokens]``.
            limit: most tokens that may be reused (vLLM must compute at least the last one).
            base: what is known of the prompt's beginning; it is not compared again.
        """
        tree = self._trees.get(session.identity)
        if tree is None:
            return Match(session, Outcome.COLD, None, 0)
        longest = tree.match(tokens[:limit], self._known(session, base))
        num_tokens, found = longest.num_tokens, longest.value
        if found is None or num_tokens < min(MIN_SHARED_TOKENS, found.frontier, limit):
            return Match(session, Outcome.COLD, None, 0)
        own = self._own_branch(session, tree, longest)
        if own is not None:
            found, num_tokens = own, min(own.frontier, num_tokens)
        return self._classify(session, found, num_tokens, limit)

    def _known(self, session: SessionKey, base: PromptBase | None) -> Known[Residency] | None:
        """The residency of the earlier prompt, if it is still here and nobody else's."""
        found = None if base is None else self._of_version.get(base.version)
        if base is None or found is None or found.session.identity != session.identity:
            return None
        return Known(found, min(base.num_tokens, found.frontier))

    def _own_branch(
        self, session: SessionKey, tree: RadixTree[Residency], longest: PrefixMatch[Residency]
    ) -> Residency | None:
        """The session's own branch, unless somebody else's saves a whole block more.

        A fork computes its parent's last sampled token first, so it often matches one token
        further; that is no reason to leave one's own session.
        """
        assert longest.node is not None
        least = longest.num_tokens - self.block_size + 1

        def order(branch: Residency) -> tuple[int, int]:
            """What shares most, and ends there."""
            return -min(branch.frontier, longest.num_tokens), branch.frontier

        for branch in sorted(self.branches(session), key=order):
            if branch.frontier < least:
                continue
            shared = min(branch.frontier, longest.num_tokens)
            if tree.num_shared(branch, longest.node) >= shared:
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
        ``ceil(turn.frontier / block_size)`` of them.

        Returns:
            The new residency; None when an existing one of the session already covers it.
        """
        assert len(turn.blocks) == -(-turn.frontier // self.block_size)
        num_turns = 1 if turn.borrowed is None else turn.borrowed.num_turns + 1
        wait = turn.wait(num_turns)
        wished_until_s = self._clock() + turn.wish_s if turn.wish_s else 0.0
        made = Residency(
            turn.session,
            turn.frontier,
            turn.blocks,
            self._block_ids(turn),
            self._expect(turn, wait, wished_until_s),
            self._trees.setdefault(turn.session.identity, RadixTree()),
            num_turns,
            turn.version,
            wished_until_s,
            wait=wait.kind,
        )
        self._plant(made, turn)
        self._learn_habits(turn)
        made.reasoning = reasoning_of(made.tree.path_up(made))
        self._drop_reasoning(made)
        if turn.borrowed is not None and turn.borrowed.alive:
            self._forget(turn.borrowed)
        if self._is_covered(made):
            self._uproot(made)
            self._release(reversed(made.blocks))
            return None
        self._mark_superseded(turn)
        self._make_room(made)
        self._sessions.setdefault(turn.session, []).append(made)
        self._park(made)
        return made

    def _plant(self, made: Residency, turn: FinishedTurn) -> None:
        """Put its tokens into the tree: those behind the residency that the turn began with."""
        known = None
        base = turn.base
        if base is not None and base.alive and base.session.identity == turn.session.identity:
            known = Known(base, min(turn.num_base_tokens, base.frontier, made.frontier))
        start = 0 if known is None else known.num_tokens
        before = Kind.OTHER if base is None or not start else self.kind_at(base, start - 1)
        cuts = self._cuts(turn, start, before)
        made.tree.insert(turn.tokens_from(start), made, known, cuts)
        if made.version is not None:
            self._of_version[made.version] = made

    def _cuts(self, turn: FinishedTurn, start: int, before: Kind) -> Cuts:
        """Where the messages behind a position begin."""
        if self._rules is None:
            return NO_CUTS
        low = max(0, start - LOOK_BACK)
        found = self._rules.cuts(turn.tokens_from(low), start - low, before)
        return Cuts(found.starts + np.int32(low), found.kinds)

    def _learn_habits(self, turn: FinishedTurn) -> None:
        """Whether the turn's prompt still had the reasoning of the answer before it."""
        base = turn.base
        reasoning = None if base is None else base.reasoning
        if base is None or reasoning is None or base.session != turn.session:
            return
        goes_further = len(turn.prompt) >= reasoning.start + len(reasoning.head)
        if turn.num_base_tokens >= reasoning.start and goes_further:
            kept = reasoning.stands_in(turn.prompt)
            self._habits.saw(turn.session.identity.cache_salt, base.wait, kept=kept)

    def _drop_reasoning(self, made: Residency) -> None:
        """Keep nothing from the reasoning on where the next turn is expected to be without it."""
        if made.reasoning is None:
            return
        if not self._habits.drops(made.session.identity.cache_salt, made.wait):
            return
        start = made.reasoning.start
        num_kept = -(-start // self.block_size)
        self.num_reasoning_dropped += made.frontier - start
        made.tree.shorten(made, start)
        given = made.blocks[num_kept:]
        made.frontier, made.blocks = start, made.blocks[:num_kept]
        made.block_ids = made.block_ids[:num_kept]
        self._release(reversed(given))

    def _uproot(self, residency: Residency) -> None:
        residency.alive = False
        residency.tree.remove(residency)
        identity = residency.session.identity
        if not len(residency.tree) and self._trees.get(identity) is residency.tree:
            del self._trees[identity]
        if self._of_version.get(residency.version) is residency:
            del self._of_version[residency.version]

    def _expect(self, turn: FinishedTurn, wait: Wait, wished_until_s: float) -> Forecast:
        """When the session is expected back."""
        tenant = turn.session.identity.tenant
        forecast = self.waits.began(turn.session, tenant, wait, self._clock())
        if self.tier is not None:
            self.tier.waits(turn.session, forecast, turn.frontier, wished_until_s)
        return forecast

    @staticmethod
    def _block_ids(turn: FinishedTurn) -> BlockIds:
        """The ids of the turn's blocks; those that it borrowed are known already."""
        known = np.empty(0, np.int32) if turn.borrowed is None else turn.borrowed.block_ids
        new = turn.blocks[len(known) :]
        return np.concatenate([known, np.fromiter((b.block_id for b in new), np.int32, len(new))])

    def _mark_superseded(self, turn: FinishedTurn) -> None:
        """An edit kills the branch that it rewrote; a sibling (a sub-agent's turn) does not.

        It is an edit when most of the branch was shared, or when the last question of the branch
        stands in the new prompt as well, behind the change.
        """
        base, num_shared = turn.base, turn.num_base_tokens
        if base is None or base is turn.borrowed or not base.alive:
            return
        if base.session != turn.session or num_shared >= base.frontier:
            return
        edited = base.frontier <= 2 * num_shared
        if not edited:
            question = end_of_question(base.tree.path_up(base), num_shared)
            edited = question is not None and is_found_in(question, turn.prompt[num_shared:])
        if edited:
            base.superseded = True
            self._idle.supersede(base)

    def _is_covered(self, made: Residency) -> bool:
        """Whether a branch of the session holds all that the turn computed (a repeated turn)."""
        end = made.tree.node_of(made)
        for branch in self.branches(made.session):
            if made.tree.num_shared(branch, end) == made.frontier:
                branch.forecast, branch.wished_until_s = made.forecast, made.wished_until_s
                branch.superseded = False
                if branch.is_idle:
                    self._enter(branch)
                return True
        return False

    def _make_room(self, made: Residency) -> None:
        """Drop the branches that the turn covers, and the least worthy beyond the limit."""
        idle = [branch for branch in self.branches(made.session) if branch.is_idle]
        end = made.tree.node_of(made)
        for branch in [*idle]:
            if made.tree.num_shared(branch, end) == branch.frontier:
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

    def demote_next(
        self, why: Demotion, num_wanted: int = 1, keep: Residency | None = None
    ) -> int | None:
        """Take blocks from the least valuable idle residency, from its end inwards.

        What it gives up begins where a message does, where that is known; of what several sessions
        have in common nothing is taken, but a residency that has no more than that is dropped.

        Args:
            why: for the count.
            num_wanted: blocks; it gives fewer when it has no more, and more up to a message.
            keep: is spared.

        Returns:
            The number of blocks that no idle residency holds any longer; None when there is none
            but ``keep``.
        """
        victim = self._idle.next_victim(self._clock(), keep)
        if victim is None:
            return None
        num_kept = 0 if victim.superseded else self._num_left(victim, num_wanted)
        return self._cut_back(victim, num_kept, why) if num_kept else self.demote(victim, why)

    def _num_left(self, victim: Residency, num_wanted: int) -> int:
        """How many blocks it keeps when it gives so many and stops where a message begins."""
        num_wanted = max(num_wanted, MIN_GIVEN_TOKENS // self.block_size)
        for node in victim.tree.own_tail(victim):
            num_kept = -(-node.start // self.block_size)
            if not node.is_cut or num_kept > len(victim.blocks) - num_wanted:
                continue
            assert node.parent is not None
            is_all_that_is_own = node.parent.values or len(node.parent.children) > 1
            return 0 if is_all_that_is_own else num_kept
        return 0

    def _cut_back(self, residency: Residency, num_kept: int, why: Demotion) -> int:
        """Give up all but the first blocks. What is left ends with a whole block."""
        before = self.pins.num_pinned
        given, ids = residency.blocks[num_kept:], residency.block_ids[num_kept:]
        residency.frontier = min(residency.frontier, num_kept * self.block_size)
        residency.tree.shorten(residency, residency.frontier)
        residency.blocks = residency.blocks[:num_kept]
        residency.block_ids = residency.block_ids[:num_kept]
        self.pins.unpin(ids)
        self._idle.shrink(residency, num_kept)
        self._release(reversed(given))
        self.demotions[why] += 1
        return before - self.pins.num_pinned

    def enforce_budget(self) -> None:
        """Demote until the pinned blocks fit their budget."""
        while self.pins.over_budget:
            num_wanted = self.pins.num_pinned - self.pins.budget_blocks
            if self.demote_next(Demotion.BUDGET, num_wanted) is None:
                return

    def expire(self, idle_s: float) -> None:
        """Demote what was not used for ``idle_s`` seconds."""
        for residency in self._idle.expired(self._clock() - idle_s, self._clock()):
            self.demote(residency, Demotion.IDLE)

    def close(self, session: SessionKey) -> int:
        """Demote all idle branches of a session. Returns how many there were."""
        idle = [branch for branch in self.branches(session) if branch.is_idle]
        for branch in idle:
            self.demote(branch, Demotion.CLOSED)
        self.waits.closed(session)
        if self.tier is not None:
            self.tier.closed(session)
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
        identity = residency.session.identity
        self._idle.add(
            residency,
            tenant=identity.tenant,
            salt=identity.cache_salt,
            num_blocks=len(residency.blocks),
            worth=residency.worth,
            forecast=residency.forecast,
            now_s=self._clock(),
            wished_until_s=residency.wished_until_s,
        )

    def _forget(self, residency: Residency) -> None:
        self._idle.discard(residency)
        branches = self._sessions[residency.session]
        branches.remove(residency)
        if not branches:
            del self._sessions[residency.session]
        self._uproot(residency)
