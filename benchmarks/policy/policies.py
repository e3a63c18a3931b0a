# SPDX-License-Identifier: Apache-2.0
"""Retention policies: what others do, the plugin's own code, and the best that is possible."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from benchmarks.policy.prefix_cache import Policy, Run, Victim
from benchmarks.policy.traces import Turn
from vllm_stateful.schedule.gaps import Forecast, Wait, WaitKind
from vllm_stateful.schedule.retention import RetentionQueue, Worth
from vllm_stateful.schedule.waits import WaitBook

TTL_S = 300.0


class Waiting(NamedTuple):
    """A thread between two turns, or a run that no thread has any longer."""

    item: Hashable
    superseded: bool
    calls_tool: bool
    num_turns: int
    used_s: float
    returns_s: float
    """For those that know the future."""


class Order(Protocol):
    """Who goes first."""

    def came_back(self, thread: Hashable, now_s: float) -> None: ...

    def add(self, waiting: Waiting) -> None: ...

    def discard(self, item: Hashable) -> None: ...

    def next_victim(self, now_s: float) -> Hashable | None: ...


class ByThread:
    """Forgets the histories of whole threads, from their ends inwards, in some order.

    What several threads have in common is forgotten with the last of them.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._ends: dict[Hashable, Run] = {}
        self._num_turns: dict[Hashable, int] = {}

    def arrived(self, turn: Turn, path: Sequence[Run], left: Sequence[Run]) -> None:
        """See ``Policy``."""
        self._order.came_back(turn.thread, turn.arrived_s)
        self._order.discard(turn.thread)
        for run in path:
            self._order.discard(run)
        for run in left:
            self._supersede(run)

    def ended(self, turn: Turn, path: Sequence[Run]) -> None:
        """See ``Policy``."""
        count = self._num_turns[turn.thread] = self._num_turns.get(turn.thread, 0) + 1
        self._ends[turn.thread] = path[-1]
        self._order.add(
            Waiting(turn.thread, False, turn.calls_tool, count, turn.ended_s, turn.returns_s)
        )

    def victim(self, now_s: float, num_needed: int) -> Victim | None:
        """See ``Policy``."""
        while (item := self._order.next_victim(now_s)) is not None:
            run = item if isinstance(item, Run) else self._ends[item]
            while not run.num_resident and run.parent is not None and len(run.threads) <= 1:
                run = run.parent
            if run.is_end and len(run.threads) <= 1:
                return Victim(run, min(num_needed, run.num_resident))
            self._exhausted(item, run)
        return None

    def _exhausted(self, item: Hashable, run: Run) -> None:
        """Nothing is left that only this thread has: the rest is the others'."""
        self._order.discard(item)
        if isinstance(item, Run):
            return
        shared: Run | None = run
        while shared is not None and shared.parent is not None:
            shared.threads.discard(item)
            self._supersede(shared)
            shared = shared.parent

    def _supersede(self, run: Run) -> None:
        if not run.threads and run.num_resident:
            self._order.add(Waiting(run, True, False, 0, run.used_s, math.inf))

    def split(self, top: Run, bottom: Run) -> None:
        """See ``Policy``."""
        if not top.threads:
            self._supersede(top)


class _ByKey:
    """An order that does not change while they wait: smallest key first."""

    def __init__(self, key: Callable[[Waiting], tuple[float, ...]]) -> None:
        self._key = key
        self._current: dict[Hashable, int] = {}
        self._heap: list[tuple[tuple[float, ...], int, Hashable]] = []
        self._number = itertools.count()

    def came_back(self, thread: Hashable, now_s: float) -> None:
        """Learns nothing."""

    def add(self, waiting: Waiting) -> None:
        number = self._current[waiting.item] = next(self._number)
        heapq.heappush(self._heap, (self._key(waiting), number, waiting.item))

    def discard(self, item: Hashable) -> None:
        self._current.pop(item, None)

    def next_victim(self, now_s: float) -> Hashable | None:
        while self._heap and self._current.get(self._heap[0][2]) != self._heap[0][1]:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None


class _Ttl(_ByKey):
    """LRU, but those that wait for a tool are kept for a while (Continuum, with one TTL)."""

    def __init__(self) -> None:
        super().__init__(lambda waiting: (waiting.used_s,))
        self._kept: OrderedDict[Hashable, Waiting] = OrderedDict()

    def add(self, waiting: Waiting) -> None:
        if waiting.calls_tool:
            self._kept[waiting.item] = waiting
        else:
            super().add(waiting)

    def discard(self, item: Hashable) -> None:
        self._kept.pop(item, None)
        super().discard(item)

    def next_victim(self, now_s: float) -> Hashable | None:
        while self._kept:
            item, waiting = next(iter(self._kept.items()))
            if waiting.used_s + TTL_S > now_s:
                break
            del self._kept[item]
            super().add(waiting)
        found = super().next_victim(now_s)
        return found if found is not None else next(iter(self._kept), None)


class _Learned:
    """The plugin's order: ``schedule.waits`` learns, ``schedule.retention`` sorts."""

    _NEVER = Forecast(np.append(np.full(36, 1e-9), 1.0))

    def __init__(self) -> None:
        self._waits = WaitBook()
        self._queue: RetentionQueue[Hashable] = RetentionQueue()

    def came_back(self, thread: Hashable, now_s: float) -> None:
        self._waits.came_back(thread, now_s)

    def add(self, waiting: Waiting) -> None:
        if waiting.superseded:
            self._queue.add(waiting.item, Worth.SUPERSEDED, self._NEVER, waiting.used_s)
            return
        kind = WaitKind.TOOL if waiting.calls_tool else WaitKind.USER
        wait = Wait(kind, num_turns=waiting.num_turns)
        forecast = self._waits.began(waiting.item, None, wait, waiting.used_s)
        self._queue.add(waiting.item, Worth.LIVE, forecast, waiting.used_s)

    def discard(self, item: Hashable) -> None:
        self._queue.discard(item)

    def next_victim(self, now_s: float) -> Hashable | None:
        return self._queue.next_victim(now_s)


def _knows_who_returns(waiting: Waiting) -> tuple[float, ...]:
    """Key of an LRU that is told which sessions are over."""
    return (math.isfinite(waiting.returns_s), waiting.used_s)


def _knows_about_when() -> Callable[[Waiting], tuple[float, ...]]:
    """Key of an order that is told each gap to within a factor of e (one standard deviation)."""
    chance = random.Random(0)

    def key(waiting: Waiting) -> tuple[float, ...]:
        if math.isinf(waiting.returns_s):
            return (-math.inf, waiting.used_s)
        gap_s = max(0.1, waiting.returns_s - waiting.used_s)
        return (-(waiting.used_s + gap_s * math.exp(chance.gauss(0, 1))), waiting.used_s)

    return key


class Belady:
    """Forgets what is needed again last: it knows the future."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Run]] = []
        self._number = itertools.count()

    def arrived(self, turn: Turn, path: Sequence[Run], left: Sequence[Run]) -> None:
        """See ``Policy``."""

    def ended(self, turn: Turn, path: Sequence[Run]) -> None:
        """See ``Policy``."""
        for run in path:
            self._offer(run)

    def split(self, top: Run, bottom: Run) -> None:
        """See ``Policy``."""
        self._offer(bottom)

    def victim(self, now_s: float, num_needed: int) -> Victim | None:
        """See ``Policy``."""
        while self._heap:
            key, _, run = heapq.heappop(self._heap)
            if not run.is_end or key != -int(run.next_use[run.num_resident - 1]):
                continue
            uses = run.next_use[: run.num_resident]
            earlier = np.flatnonzero(uses != uses[-1])
            num_alike = run.num_resident - (int(earlier[-1]) + 1 if len(earlier) else 0)
            count = min(num_needed, num_alike)
            self._push(run, run.num_resident - count)
            return Victim(run, count)
        return None

    def _offer(self, run: Run) -> None:
        if run.is_end:
            self._push(run, run.num_resident)

    def _push(self, run: Run, num_resident: int) -> None:
        """Offer a run of which so many blocks are left; its parent when there are none."""
        while not num_resident and run.parent is not None:
            run = run.parent
            num_resident = run.num_resident
        if run.parent is not None:
            use = int(run.next_use[num_resident - 1])
            heapq.heappush(self._heap, (-use, next(self._number), run))


POLICIES: dict[str, Callable[[], Policy]] = {
    "LRU": lambda: ByThread(_ByKey(lambda waiting: (waiting.used_s,))),
    "superseded first, then LRU": lambda: ByThread(
        _ByKey(lambda waiting: (not waiting.superseded, waiting.used_s))
    ),
    f"TTL {TTL_S:.0f} s for tools": lambda: ByThread(_Ttl()),
    "learned (the plugin)": lambda: ByThread(_Learned()),
    "told who returns": lambda: ByThread(_ByKey(_knows_who_returns)),
    "told gaps, times e^N(0,1)": lambda: ByThread(_ByKey(_knows_about_when())),
    "Belady": Belady,
}
"""By name; the first is stock vLLM's, the last three know of the future."""

PLUGIN = "learned (the plugin)"
