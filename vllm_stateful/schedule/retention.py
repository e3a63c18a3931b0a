# SPDX-License-Identifier: Apache-2.0
"""The order in which idle residencies give their blocks back.

Superseded histories go first. Among the others the one goes first whose return is expected least,
per second for which its blocks would be kept (``schedule.gaps``). What is expected changes with the
age of a wait, at a few dozen known times, so the order is a heap whose entries are renewed when
their time comes: every operation is O(log n), and none looks at all entries.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Hashable
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

from vllm_stateful.schedule.gaps import Forecast

R = TypeVar("R", bound=Hashable)


class Worth(IntEnum):
    """Retention classes, worst first."""

    SUPERSEDED = 0
    """A later turn of the session edited this history away."""
    LIVE = 1
    """Its session may come back."""


@dataclass(eq=False, slots=True)
class _Entry(Generic[R]):
    item: R
    worth: Worth
    forecast: Forecast
    used_s: float
    key: tuple[int, float, float, int]
    """Smaller goes first: class, rate, last use, order of entry. The current one only counts."""


class RetentionQueue(Generic[R]):
    """Idle residencies, ordered by who goes first. Times are those of one clock."""

    def __init__(self) -> None:
        self._entries: dict[R, _Entry[R]] = {}
        self._order: list[tuple[tuple[int, float, float, int], _Entry[R]]] = []
        self._changes: list[tuple[float, int, _Entry[R]]] = []
        self._number = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, item: R, worth: Worth, forecast: Forecast, now_s: float) -> None:
        """Enter ``item`` as used now."""
        self.discard(item)
        entry = _Entry(item, worth, forecast, now_s, (0, 0.0, 0.0, 0))
        self._entries[item] = entry
        self._enter(entry, now_s)
        self._drop_stale()

    def discard(self, item: R) -> None:
        """Take ``item`` out; a no-op when it is not in."""
        self._entries.pop(item, None)

    def supersede(self, item: R) -> None:
        """Let ``item`` go before all that are live; a no-op when it is not in."""
        entry = self._entries.get(item)
        if entry is not None:
            entry.worth = Worth.SUPERSEDED
            self._enter(entry, entry.used_s)

    def next_victim(self, now_s: float, keep: R | None = None) -> R | None:
        """The residency to demote first, sparing ``keep``; None when nothing is left."""
        self._renew(now_s)
        spared = None
        while self._order:
            key, entry = self._order[0]
            if not self._is_current(key, entry):
                heapq.heappop(self._order)
            elif entry.item == keep:
                spared = heapq.heappop(self._order)
            else:
                break
        found = self._order[0][1].item if self._order else None
        if spared is not None:
            heapq.heappush(self._order, spared)
        return found

    def rank(self, item: R) -> tuple[Worth, float, float]:
        """What it is ordered by, smallest first: class, rate, last use.

        Raises:
            KeyError: it is not in.
        """
        entry = self._entries[item]
        return (entry.worth, entry.key[1], entry.used_s)

    def expired(self, deadline_s: float) -> list[R]:
        """Those last used before ``deadline_s``, oldest first."""
        found: list[R] = []
        for item, entry in self._entries.items():
            if entry.used_s >= deadline_s:
                break
            found.append(item)
        return found

    def _enter(self, entry: _Entry[R], now_s: float) -> None:
        age_s = max(0.0, now_s - entry.used_s)
        rate = 0.0 if entry.worth is Worth.SUPERSEDED else entry.forecast.rate(age_s)
        entry.key = (entry.worth, rate, entry.used_s, next(self._number))
        heapq.heappush(self._order, (entry.key, entry))
        change_s = entry.used_s + entry.forecast.next_change_s(age_s)
        if entry.worth is not Worth.SUPERSEDED and change_s < math.inf:
            heapq.heappush(self._changes, (change_s, entry.key[-1], entry))

    def _renew(self, now_s: float) -> None:
        """Enter those again whose rate has changed."""
        while self._changes and self._changes[0][0] <= now_s:
            _, number, entry = heapq.heappop(self._changes)
            if entry.key[-1] == number and self._entries.get(entry.item) is entry:
                self._enter(entry, now_s)

    def _is_current(self, key: tuple[int, float, float, int], entry: _Entry[R]) -> bool:
        return entry.key is key and self._entries.get(entry.item) is entry

    def _drop_stale(self) -> None:
        """Rebuild the heaps when most of what they hold was taken out or renewed."""
        if len(self._order) + len(self._changes) > 64 + 6 * len(self._entries):
            live = list(self._entries.values())
            self._order = [(entry.key, entry) for entry in live]
            numbers = {entry.key[-1] for entry in live}
            self._changes = [change for change in self._changes if change[1] in numbers]
            heapq.heapify(self._order)
            heapq.heapify(self._changes)
