# SPDX-License-Identifier: Apache-2.0
"""A prefix cache of a given size, and what a policy lets it forget.

Histories are kept as a tree of runs: blocks that follow each other and were never left at a point
between them. A run is cut where a history leaves it. Blocks are forgotten from the end of a history
inwards, so what is left of it can still be found; those of running turns never are.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from benchmarks.policy.traces import NEVER, Blocks, Turn


@dataclass(eq=False, slots=True)
class Run:
    """Blocks of the tree; ``parent`` is None for a root, which has no blocks."""

    blocks: Blocks
    next_use: Blocks
    parent: Run | None
    children: dict[int, Run] = field(default_factory=dict)
    num_resident: int = 0
    """The first blocks are in the cache; all of them are before any child has one."""
    num_running: int = 0
    used_s: float = 0.0
    threads: set[Hashable] = field(default_factory=set)
    """Whose last turn has this run in its prompt."""

    @property
    def is_end(self) -> bool:
        """Whether its last resident block may be forgotten."""
        if self.num_running or not self.num_resident:
            return False
        return not any(child.num_resident or child.num_running for child in self.children.values())


class Victim(NamedTuple):
    """The last ``num_blocks`` resident blocks of a run."""

    run: Run
    num_blocks: int


class Policy(Protocol):
    """What is asked of a retention policy."""

    def arrived(self, turn: Turn, path: Sequence[Run], left: Sequence[Run]) -> None:
        """A turn begins; it builds on ``path`` and its thread has ``left`` other runs."""

    def ended(self, turn: Turn, path: Sequence[Run]) -> None:
        """A turn ended, and its thread waits."""

    def victim(self, now_s: float, num_needed: int) -> Victim | None:
        """What to forget next; None when there is nothing that no running turn needs."""

    def split(self, top: Run, bottom: Run) -> None:
        """A run was cut in two; ``bottom`` is the object that was the whole."""


class PrefixCache:
    """Plays turns.

    Args:
        capacity: blocks. Running turns that need more are served all the same, and counted.
        policy: who is forgotten.
    """

    def __init__(self, capacity: int, policy: Policy) -> None:
        self.capacity = capacity
        self.num_used = 0
        self.num_computed = 0
        """Blocks that were not in the cache when a turn needed them."""
        self.num_overfull = 0
        """Turns that found the cache full of running ones."""
        self._policy = policy
        self._roots: dict[Hashable, Run] = {}
        self._ends: dict[Hashable, Run] = {}
        self._running: list[tuple[float, int, Turn, Run]] = []
        self._number = itertools.count()

    def play(self, turns: Sequence[Turn]) -> None:
        """All turns, in order of arrival."""
        for turn in turns:
            self.begin(turn)

    def begin(self, turn: Turn) -> int:
        """One turn arrives. Returns the number of blocks that it had to compute."""
        while self._running and self._running[0][0] <= turn.arrived_s:
            self._end(*heapq.heappop(self._running)[2:])
        path = self._path_of(turn)
        missing = [len(run.blocks) - run.num_resident for run in path]
        self.num_computed += sum(missing)
        for run in path:
            run.num_running += 1
        self._move(turn, path)
        self._make_room(sum(missing), turn.arrived_s)
        assert turn.next_use is not None
        place = 0
        for run in path:
            run.num_resident = len(run.blocks)
            run.used_s = turn.arrived_s
            run.next_use = turn.next_use[place : place + len(run.blocks)]
            place += len(run.blocks)
        self.num_used += sum(missing)
        heapq.heappush(self._running, (turn.ended_s, next(self._number), turn, path[-1]))
        return sum(missing)

    def _end(self, turn: Turn, last: Run) -> None:
        path = _path_to(last)
        for run in path:
            run.num_running -= 1
            run.used_s = max(run.used_s, turn.ended_s)
        self._policy.ended(turn, path)

    def _move(self, turn: Turn, path: Sequence[Run]) -> None:
        """The thread has this path now, and no other."""
        before = self._ends.get(turn.thread)
        left = [run for run in _path_to(before) if run not in path] if before else []
        for run in left:
            run.threads.discard(turn.thread)
        for run in path:
            run.threads.add(turn.thread)
        self._ends[turn.thread] = path[-1]
        self._policy.arrived(turn, path, left)

    def _path_of(self, turn: Turn) -> list[Run]:
        """The runs that are exactly the turn's prompt; cut and made as needed."""
        empty = np.empty(0, np.int64)
        run = self._roots.setdefault(turn.space, Run(empty, empty, None))
        path: list[Run] = []
        blocks = turn.blocks
        while len(blocks):
            child = run.children.get(int(blocks[0]))
            if child is None:
                path.append(self._append(run, blocks, turn.thread))
                return list(dict.fromkeys(path))
            num_shared = _num_shared(child.blocks, blocks)
            if num_shared < len(child.blocks):
                child = self._cut(child, num_shared)
            path.append(child)
            run, blocks = child, blocks[num_shared:]
        return path

    @staticmethod
    def _append(run: Run, blocks: Blocks, thread: Hashable) -> Run:
        """New blocks behind a run: in it where only this thread has it, else as a child."""
        next_use = np.full(len(blocks), NEVER, np.int64)
        is_own = run.parent is not None and not run.children and run.threads == {thread}
        if is_own and not run.num_running:
            run.blocks = np.concatenate([run.blocks, blocks])
            run.next_use = np.concatenate([run.next_use, next_use])
            return run
        made = run.children[int(blocks[0])] = Run(blocks, next_use, run)
        return made

    def _cut(self, run: Run, size: int) -> Run:
        """Make the first blocks of a run one of its own; returns it."""
        assert run.parent is not None
        top = Run(run.blocks[:size], run.next_use[:size], run.parent)
        top.children = {int(run.blocks[size]): run}
        top.num_resident = min(run.num_resident, size)
        top.num_running, top.used_s, top.threads = run.num_running, run.used_s, set(run.threads)
        run.parent.children[int(run.blocks[0])] = top
        run.blocks, run.next_use, run.parent = run.blocks[size:], run.next_use[size:], top
        run.num_resident -= top.num_resident
        self._policy.split(top, run)
        return top

    def _make_room(self, num_blocks: int, now_s: float) -> None:
        excess = self.num_used + num_blocks - self.capacity
        while excess > 0:
            victim = self._policy.victim(now_s, excess)
            if victim is None:
                self.num_overfull += 1
                return
            assert victim.run.is_end
            assert 0 < victim.num_blocks <= victim.run.num_resident
            victim.run.num_resident -= victim.num_blocks
            self.num_used -= victim.num_blocks
            excess -= victim.num_blocks


def _path_to(run: Run) -> list[Run]:
    """From the root's child on."""
    path = []
    while run.parent is not None:
        path.append(run)
        run = run.parent
    return path[::-1]


def _num_shared(one: Blocks, other: Blocks) -> int:
    size = min(len(one), len(other))
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if len(different) else size
