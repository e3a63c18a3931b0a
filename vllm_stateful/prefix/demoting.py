# SPDX-License-Identifier: Apache-2.0
"""Giving blocks back to the pool: under pressure, over budget, after a timeout, or at a close."""

from __future__ import annotations

from vllm_stateful.prefix.residency import Residency
from vllm_stateful.prefix.residency_book import ResidencyBook
from vllm_stateful.types import Demotion, SessionKey

MIN_GIVEN_TOKENS = 256
"""A residency that gives up some of its end gives at least so many tokens."""


class Demoting(ResidencyBook):
    """Chooses which residency gives blocks, and how many."""

    def demote(self, residency: Residency, why: Demotion) -> int:
        """Return an idle residency's blocks to the pool, tail first.

        Full blocks stay findable by vLLM's own prefix cache until they are reused.

        Returns:
            The number of blocks that no idle residency holds any longer.
        """
        assert residency.borrower is None
        before = self.pins.num_pinned
        self._forget(residency)
        self._unpin(residency.tables)
        self._give(residency.tables)
        self._release_points_of(residency)
        self._report_demotion(residency, why, 0)
        return before - self.pins.num_pinned

    def demote_next(
        self, why: Demotion, num_wanted: int = 1, keep: Residency | None = None
    ) -> int | None:
        """Take blocks from the least valuable idle residency, from its end inwards.

        The cut is at the beginning of a message, where message boundaries are known. It lies in the
        part that no other residency shares. A residency without such a part is dropped as a whole.

        Args:
            why: the reason to count it under.
            num_wanted: blocks. It gives fewer if it has no more, and more to reach a message.
            keep: the residency that must not be taken from.

        Returns:
            The number of blocks that no idle residency holds any longer; None when no residency
            but ``keep`` is idle.
        """
        victim = self._idle.next_victim(self._clock(), keep)
        if victim is None:
            return None
        frontier = 0 if victim.superseded else self._end_of_rest(victim, num_wanted)
        return self._cut_back(victim, frontier, why) if frontier else self.demote(victim, why)

    def _end_of_rest(self, victim: Residency, num_wanted: int) -> int:
        """The frontier of a victim once it gave so many blocks; 0 when it has to give all."""
        if self.has_points:
            return self._earlier_point(victim, num_wanted)
        num_wanted = max(-(-num_wanted // len(self.groups)), MIN_GIVEN_TOKENS // self.block_size)
        num_held = len(victim.tables[0].blocks)  # each group gives as many
        for node in victim.tree.own_tail(victim):
            num_kept = -(-node.start // self.block_size)
            if not node.is_cut or num_kept > num_held - num_wanted:
                continue
            assert node.parent is not None
            is_all_that_is_own = node.parent.values or len(node.parent.children) > 1
            return 0 if is_all_that_is_own else num_kept * self.block_size
        return 0

    def _earlier_point(self, victim: Residency, num_wanted: int) -> int:
        """The position of its last resume point with so many blocks behind it; 0 without one."""
        num_given = 0
        for earlier, point in zip(victim.points[-2::-1], victim.points[::-1], strict=False):
            num_given += len(point.blocks)
            behind = sum(
                len(table.blocks) - group.end(earlier.position)
                for group, table in zip(self.groups, victim.tables, strict=True)
                if group.is_full
            )
            if num_given + behind >= num_wanted:
                return earlier.position
        return 0

    def _cut_back(self, residency: Residency, frontier: int, why: Demotion) -> int:
        """Give up what is behind a position."""
        before = self.pins.num_pinned
        given = self._shorten(residency, min(frontier, residency.frontier))
        self._unpin(given)
        self._idle.shrink(residency, residency.num_blocks)
        self._give(given)
        self._report_demotion(residency, why, residency.frontier)
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

    def drop_all(self) -> None:
        """Drop everything; borrowed blocks stay with their turns."""
        for residency in self.residencies():
            if residency.borrower is None:
                self.demote(residency, Demotion.RESET)
            else:
                self._forget(residency)
                self._report_demotion(residency, Demotion.RESET, 0)
