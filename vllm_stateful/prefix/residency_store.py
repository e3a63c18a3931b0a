# SPDX-License-Identifier: Apache-2.0
"""The life of a residency: which turn may continue it, and what replaces it.

The store owns one reference on each block of an *idle* residency. A turn that continues at the
frontier *borrows* it: the references and the block list move to the turn without a copy. When the
turn ends it gives both back, with what it added. All other readers (forks, edits, parallel turns)
share: they take references of their own, and copy the last block before they write to it.

Source: arXiv:2605.26289 (persistent per-session KV, metadata-only aliasing).
"""

from __future__ import annotations

import numpy as np

from vllm_stateful.prefix.boundaries import Cuts, Kind
from vllm_stateful.prefix.demoting import Demoting
from vllm_stateful.prefix.groups.table import ResumePoint, Tables
from vllm_stateful.prefix.matching import Matching
from vllm_stateful.prefix.radix_tree import NO_CUTS, Known, RadixTree
from vllm_stateful.prefix.reasoning import reasoning_of
from vllm_stateful.prefix.residency import FinishedTurn, Residency
from vllm_stateful.schedule.gaps import Forecast, Wait, WaitKind
from vllm_stateful.schedule.waits import Ended
from vllm_stateful.types import Demotion, SessionKey, Shape

LOOK_BACK = 64
"""Tokens before a position that are read to tell what begins there (``BoundaryRules.cuts``)."""

MAX_BRANCHES = 4
"""Residencies of one session id. Several are needed: sub-agents often share their root's id."""


class ResidencyStore(Matching, Demoting):
    """All residencies of one engine core, and the life of each. See `ResidencyBook` for arguments.

    Not thread-safe: owned by the scheduler's thread.
    """

    def arrived(self, session: SessionKey, seconds_ago: float = 0.0) -> Ended | None:
        """A turn of the session came in: learn from the gap before it. Call once per turn.

        Returns:
            The wait that has ended; None when the session was not known to wait.
        """
        return self.waits.came_back(session, self._clock() - seconds_ago)

    def borrow(self, residency: Residency, request_id: str) -> Tables:
        """Hand a residency's blocks and references to a turn, which continues at its frontier.

        The turn gets the references on its other resume points as well. Other turns may still start
        at those.

        Returns:
            One table for each group. Those of full groups are the residency's own.
        """
        assert residency.alive
        assert residency.borrower is None
        residency.borrower = request_id
        self._idle.discard(residency)
        self._unpin(residency.tables)
        for point in residency.points:
            self._unpin(point.tables)
        if not self.has_points:
            return residency.tables
        point = residency.lent = residency.points.pop()
        assert point.position == residency.frontier
        return tuple(
            full if group.is_full else held
            for group, full, held in zip(self.groups, residency.tables, point.tables, strict=True)
        )

    def undo_borrow(self, residency: Residency) -> None:
        """Undo ``borrow`` before the turn appended anything (its allocation was refused)."""
        assert residency.alive
        assert residency.borrower is not None
        residency.borrower = None
        if residency.lent is not None:
            residency.points.append(residency.lent)
            residency.lent = None
        self._park(residency)

    def forfeit(self, residency: Residency, why: Demotion) -> None:
        """Forget a borrowed residency; its blocks stay with the borrower, who frees them."""
        assert residency.borrower is not None
        if residency.alive:
            self._forget(residency)
            self._report_demotion(residency, why, 0)

    def finish(self, turn: FinishedTurn) -> Residency | None:
        """Keep what a turn computed, in place of what it makes redundant.

        Takes over one reference per block of ``turn.tables``, exactly those up to the frontier of
        each full group, and one per block of each of ``turn.points``.

        Returns:
            The new residency; None when an existing one of the session already covers it, or when
            it could be continued nowhere.
        """
        self._check(turn)
        if self.has_points and not turn.points:
            self._let_go(turn)
            return None
        num_turns = self._num_turns(turn)
        wait = turn.wait(num_turns)
        wished_until_s = self._clock() + turn.wish_s if turn.wish_s else 0.0
        is_beside = self.is_beside(turn.session, turn.shape)
        made = Residency(
            turn.session,
            turn.frontier,
            turn.tables,
            self._expect(turn, wait, wished_until_s, is_beside=is_beside),
            self._trees.setdefault(turn.session.identity, RadixTree()),
            len(turn.prompt),
            num_turns,
            turn.version,
            wished_until_s,
            points=self._chosen(turn.points),
            wait=wait.kind,
            shape=self._shape(turn),
        )
        self._plant(made, turn)
        self._learn_habits(turn)
        made.reasoning = reasoning_of(made.tree.path_up(made))
        self._drop_reasoning(made)
        if self.has_points and made.frontier:
            self._give(self._shorten(made, made.frontier))  # to its last resume point
        if turn.borrowed is not None and turn.borrowed.alive:
            self._forget(turn.borrowed)
        if not made.frontier or self._is_covered(made):
            self._uproot(made)
            self._give(made.tables)
            self.release_points(made.points)
            return None
        if not is_beside:
            self._mark_superseded(turn)
        self._make_room(made)
        self._sessions.setdefault(turn.session, []).append(made)
        self._park(made)
        return made

    def _num_turns(self, turn: FinishedTurn) -> int:
        """How many turns its conversation has had, this one included."""
        if turn.borrowed is not None:
            return turn.borrowed.num_turns + 1
        base = turn.base
        if base is None or base.session != turn.session:
            return 1
        goes_on = self.is_continued(base, turn.num_base_tokens, turn.prompt)
        return base.num_turns + 1 if goes_on else 1

    def _check(self, turn: FinishedTurn) -> None:
        for group, table in zip(self.groups, turn.tables, strict=True):
            assert len(table.blocks) == (group.end(turn.frontier) if group.is_full else 0)

    def _let_go(self, turn: FinishedTurn) -> None:
        """Keep nothing of a turn that can be continued nowhere."""
        if turn.borrowed is not None and turn.borrowed.alive:
            self._forget(turn.borrowed)
        self._give(turn.tables)

    def _chosen(self, points: list[ResumePoint]) -> list[ResumePoint]:
        """Choose as many points as a residency may have; give the others back.

        In this order: the frontier; the end of the last prompt, for a history that comes back
        changed; the question before that; points at which other sessions start, the earliest first;
        of the rest the latest. Points inside the last answer do not count: they are dropped once
        the next turn has come.
        """
        inside = [point for point in points[:-1] if point.is_answer]
        lasting = [point for point in points if point not in inside]
        if len(lasting) <= self.max_points:
            return points
        frontier, *before = reversed(lasting)
        asked = [point for point in before[1:] if point.is_question][:1]
        first = [frontier, *before[:1], *asked]
        others = [point for point in lasting if point not in first]
        others.sort(key=lambda p: (not p.is_shared, p.position if p.is_shared else -p.position))
        kept = [*inside, *[*first, *others][: self.max_points]]
        kept.sort(key=lambda point: point.position)
        names = set(map(id, kept))
        self.release_points(point for point in points if id(point) not in names)
        return kept

    def _plant(self, made: Residency, turn: FinishedTurn) -> None:
        """Insert its tokens into the tree, behind those that its base has there already."""
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
        """Learn whether the turn's prompt still had the reasoning of the answer before it."""
        base = turn.base
        reasoning = None if base is None else base.reasoning
        if base is None or reasoning is None or base.session != turn.session:
            return
        goes_further = len(turn.prompt) >= reasoning.start + len(reasoning.head)
        if turn.num_base_tokens >= reasoning.start and goes_further:
            kept = reasoning.stands_in(turn.prompt)
            self._habits.saw(turn.session.identity.cache_salt, base.wait, kept=kept)

    def _drop_reasoning(self, made: Residency) -> None:
        """Give up the reasoning and all behind it, if the next prompt is expected without it."""
        if made.reasoning is None:
            return
        if not self._habits.drops(made.session.identity.cache_salt, made.wait):
            return
        before = made.frontier
        self._give(self._shorten(made, made.reasoning.start))
        self.num_reasoning_dropped += before - made.frontier

    @staticmethod
    def _shape(turn: FinishedTurn) -> Shape:
        """The shape of what a turn leaves: a history whose turns had tools stays one of tools."""
        had_tools = turn.borrowed is not None and turn.borrowed.shape is Shape.TOOLS
        return Shape.TOOLS if had_tools else turn.shape

    def _expect(
        self, turn: FinishedTurn, wait: Wait, wished_until_s: float, *, is_beside: bool
    ) -> Forecast:
        """When the session is expected back; a request on the side changes no wait of it."""
        tenant = turn.session.identity.tenant
        if is_beside:
            return self.waits.gaps.forecast(tenant, Wait(WaitKind.ONE_SHOT))
        now_s = self._clock()
        forecast = self.waits.began(turn.session, tenant, wait, now_s, turn.expected_s)
        if self.tier is not None:
            self.tier.waits(turn.session, forecast, turn.frontier, wished_until_s)
        return forecast

    def _mark_superseded(self, turn: FinishedTurn) -> None:
        """Mark the branch that a turn rewrote as worthless; not that of a sibling (a sub-agent).

        The turn rewrote it if it shares most of the branch, or if the branch's last question occurs
        in the new prompt behind the first difference.
        """
        base, num_shared = turn.base, turn.num_base_tokens
        if base is None or base is turn.borrowed or not base.alive:
            return
        if base.session != turn.session or num_shared >= base.frontier:
            return
        if base.frontier <= 2 * num_shared or self.is_asked_again(base, num_shared, turn.prompt):
            base.superseded = True
            self._idle.supersede(base)

    def _is_covered(self, made: Residency) -> bool:
        """Whether a branch of the session holds all that the turn computed (a repeated turn)."""
        end = made.tree.node_of(made)
        for branch in self.branches(made.session):
            if self.has_points and not any(p.position == made.frontier for p in branch.points):
                continue
            if made.tree.num_shared(branch, end) == made.frontier:
                branch.forecast, branch.wished_until_s = made.forecast, made.wished_until_s
                branch.superseded = False
                if branch.is_idle:
                    self._enter(branch)
                return True
        return False

    def _make_room(self, made: Residency) -> None:
        """Drop the branches that the turn covers, and those of least worth beyond the limit."""
        idle = [branch for branch in self.branches(made.session) if branch.is_idle]
        end = made.tree.node_of(made)
        for branch in [*idle]:
            if made.tree.num_shared(branch, end) == branch.frontier:
                self.demote(branch, Demotion.SUPERSEDED)
                idle.remove(branch)
        idle.sort(key=lambda branch: (branch.worth, branch.shape is not Shape.BARE))
        while len(idle) >= MAX_BRANCHES:
            self.demote(idle.pop(0), Demotion.SUPERSEDED)
