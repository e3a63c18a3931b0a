# SPDX-License-Identifier: Apache-2.0
"""What is kept and by whom: the books that matching, one turn and giving back share.

The store owns one reference on each block of an *idle* residency, and one for each of its resume
points that holds the block.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from vllm_stateful.prefix.boundaries import BoundaryRules, Kind, begins_message
from vllm_stateful.prefix.groups.full import FullGroup
from vllm_stateful.prefix.groups.table import (
    Group,
    ResumePoint,
    Table,
    joined_blocks,
)
from vllm_stateful.prefix.pins import PinLedger
from vllm_stateful.prefix.radix_tree import RadixTree
from vllm_stateful.prefix.reasoning import ReasoningHabits
from vllm_stateful.prefix.residency import OffloadTier, Residency
from vllm_stateful.schedule.fairness import FairQueue
from vllm_stateful.schedule.waits import WaitBook
from vllm_stateful.types import Demotion, Identity, SessionKey, Shape

WISHED_SHARE = 0.5
"""Wishes of clients count up to this share of the budget."""

MAX_ORDERED = 1000
"""Of more idle residencies nobody is told the order in which they go."""

MAX_POINTS = 4
"""Resume points of one residency, its frontier included."""


class ResidencyBook:
    """All residencies of one engine core. Not thread-safe: owned by the scheduler's thread.

    Args:
        block_size: tokens per block of the first group.
        num_blocks: blocks in the pool, the null block included.
        budget_blocks: most distinct blocks that idle residencies may hold.
        release: returns blocks to the pool; called with blocks in eviction order (tail first).
        clock: seconds, monotonic.
        rules: where messages begin in token ids; None when that is not known.
        groups: what each KV cache group needs; None: one group of full attention.
        max_points: resume points of one residency, its frontier included.
    """

    def __init__(
        self,
        block_size: int,
        num_blocks: int,
        budget_blocks: int,
        release: Callable[[Iterable[Any]], None],
        clock: Callable[[], float],
        rules: BoundaryRules | None = None,
        groups: Sequence[Group] | None = None,
        max_points: int = MAX_POINTS,
    ) -> None:
        self.block_size = block_size
        self.groups: tuple[Group, ...] = tuple(groups or (FullGroup(block_size),))
        self.has_points = not all(group.is_full for group in self.groups)
        """Whether only some positions can be continued."""
        self.max_points = max_points
        self.pins = PinLedger(num_blocks, budget_blocks)
        self.demotions = dict.fromkeys(Demotion, 0)
        self.on_demoted: Callable[[SessionKey, Demotion, int], None] | None = None
        """Told whose KV was given back, why, and how many tokens of it stayed."""
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

    def now_s(self) -> float:
        """The time, on the engine's clock."""
        return self._clock()

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

    def message_at(self, residency: Residency, position: int) -> int | None:
        """The index of the message that a token of a residency lies in, the first one being 0.

        Reasoning, the text of an answer and its calls are one message. None where boundaries are
        not known, or before the first message.
        """
        if not residency.alive:
            return None
        number, before = -1, Kind.OTHER
        for node in reversed([*residency.tree.path_up(residency)]):
            if node.start > position:
                break
            kind = Kind(node.kind)
            if node.is_cut and begins_message(kind, before):
                number += 1
            before = kind
        return number if number >= 0 else None

    def branches(self, session: SessionKey) -> tuple[Residency, ...]:
        return tuple(self._sessions.get(session, ()))

    def place_of(self, session: SessionKey, *, counts_all: bool) -> int | None:
        """How many sessions are to lose all they keep before this one does.

        O(n log n). None if it keeps nothing idle, or if more than ``MAX_ORDERED`` residencies are.

        Args:
            session: its key.
            counts_all: whether sessions with another cache salt, as other tenants have, count.
        """
        if self.num_idle > MAX_ORDERED:
            return None
        salt = session.identity.cache_salt
        order = (each.session for each in reversed(self._idle.order(self._clock())))
        counted = (each for each in order if counts_all or each.identity.cache_salt == salt)
        last_first = list(dict.fromkeys(counted))
        return len(last_first) - 1 - last_first.index(session) if session in last_first else None

    def is_beside(self, session: SessionKey, shape: Shape) -> bool:
        """Whether a request stands beside what a session keeps, as one for a title does.

        Args:
            session: its session.
            shape: what the request is made of.
        """
        branches = self.branches(session) if shape is Shape.BARE else ()
        return any(branch.shape is Shape.TOOLS for branch in branches)

    # ---- pins ----------------------------------------------------------------------------

    def _park(self, residency: Residency) -> None:
        """It is idle now: whatever it holds is pinned."""
        self._pin(residency.tables)
        for point in residency.points:
            self._pin(point.tables)
        self._enter(residency)

    def _pin(self, tables: Iterable[Table]) -> None:
        for table in tables:
            self.pins.pin(table.ids)

    def _unpin(self, tables: Iterable[Table]) -> None:
        for table in tables:
            self.pins.unpin(table.ids)

    def _give(self, tables: Iterable[Table]) -> None:
        """Return blocks to the pool, tail first. Nobody pins them any longer."""
        self._release(reversed(joined_blocks(tables)))

    def release_points(self, points: Iterable[ResumePoint]) -> None:
        """Give back what a running turn held for resume points."""
        for point in points:
            self._give(point.tables)

    def _release_points_of(self, residency: Residency) -> None:
        """Give back the points that a residency holds, pinned all of them."""
        for point in residency.points:
            self._unpin(point.tables)
            self._give(point.tables)
        residency.points = []

    def _shorten(self, residency: Residency, frontier: int) -> list[Table]:
        """Let it end earlier, with a resume point where it needs one.

        Returns:
            What it held behind the new end. It is pinned as before.
        """
        given: list[Table] = []
        while residency.points and residency.points[-1].position > frontier:
            given += residency.points.pop().tables
        if self.has_points:
            frontier = residency.points[-1].position if residency.points else 0
        for group, table in zip(self.groups, residency.tables, strict=True):
            if group.is_full:
                given.append(table.keep(group.end(frontier)))
        residency.frontier = frontier
        if frontier:
            residency.tree.shorten(residency, frontier)
        return given

    def _report_demotion(self, residency: Residency, why: Demotion, num_kept: int) -> None:
        """A residency gave blocks back, and keeps so many tokens."""
        self.demotions[why] += 1
        if self.on_demoted is not None:
            self.on_demoted(residency.session, why, num_kept)

    # ---- entries -------------------------------------------------------------------------

    def _enter(self, residency: Residency) -> None:
        identity = residency.session.identity
        self._idle.add(
            residency,
            tenant=identity.tenant,
            salt=identity.cache_salt,
            num_blocks=residency.num_blocks,
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

    def _uproot(self, residency: Residency) -> None:
        residency.alive = False
        residency.tree.remove(residency)
        identity = residency.session.identity
        if not len(residency.tree) and self._trees.get(identity) is residency.tree:
            del self._trees[identity]
        if self._of_version.get(residency.version) is residency:
            del self._of_version[residency.version]
