# SPDX-License-Identifier: Apache-2.0
"""The order in which idle residencies give their blocks back.

Superseded histories go first, in the order in which they were superseded. Among the others the one
goes first whose return is expected least, per second for which its blocks would be kept
(``schedule.gaps``). What is expected changes all the time, so nothing is kept in order: of up to
``SAMPLE`` residencies all are looked at, of more a random sample of that size and the worst of
earlier samples. Every operation is O(1).

Source: sampled eviction as in least hit density (Beckmann et al., NSDI'18) and Redis.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from enum import IntEnum
from typing import Generic, NamedTuple, TypeVar

from vllm_stateful.schedule.gaps import Forecast

R = TypeVar("R", bound=Hashable)

SAMPLE = 32
"""Residencies that are looked at to choose one; the choice is among the worst few percent."""

NUM_RUNNERS_UP = 8
"""The next worst of a sample, which are looked at again with the next one."""


class Worth(IntEnum):
    """Retention classes, worst first."""

    SUPERSEDED = 0
    """A later turn of the session edited this history away."""
    LIVE = 1
    """Its session may come back."""


class _Entry(NamedTuple):
    worth: Worth
    forecast: Forecast
    used_s: float


Rank = tuple[Worth, float, float]
"""Smaller goes first: class, rate of return, last use."""


class RetentionQueue(Generic[R]):
    """Idle residencies, and which goes first. Times are those of one clock."""

    def __init__(self) -> None:
        self._entries: OrderedDict[R, _Entry] = OrderedDict()
        """By last use."""
        self._superseded: OrderedDict[R, None] = OrderedDict()
        self._live: list[R] = []
        self._places: dict[R, int] = {}
        """Where in ``_live`` each is."""
        self._runners_up: list[R] = []
        self._chance = random.Random(0)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, item: R, worth: Worth, forecast: Forecast, now_s: float) -> None:
        """Enter ``item`` as used now."""
        self.discard(item)
        self._entries[item] = _Entry(worth, forecast, now_s)
        if worth is Worth.SUPERSEDED:
            self._superseded[item] = None
        else:
            self._places[item] = len(self._live)
            self._live.append(item)

    def discard(self, item: R) -> None:
        """Take ``item`` out; a no-op when it is not in."""
        if self._entries.pop(item, None) is not None:
            self._superseded.pop(item, None)
            self._drop_live(item)

    def supersede(self, item: R) -> None:
        """Let ``item`` go before all that are live; a no-op when it is not in."""
        entry = self._entries.get(item)
        if entry is not None:
            self._entries[item] = entry._replace(worth=Worth.SUPERSEDED)
            self._superseded[item] = None
            self._drop_live(item)

    def next_victim(self, now_s: float, keep: R | None = None) -> R | None:
        """The residency to demote first, sparing ``keep``; None when nothing is left."""
        for item in self._superseded:
            if item != keep:
                return item
        ranked = sorted(
            (self.rank(item, now_s), self._places[item])
            for item in self._candidates()
            if item != keep
        )
        worst = [self._live[place] for _, place in ranked[: 1 + NUM_RUNNERS_UP]]
        self._runners_up = worst
        return worst[0] if worst else None

    def rank(self, item: R, now_s: float) -> Rank:
        """What ``item`` is compared by.

        Raises:
            KeyError: it is not in.
        """
        worth, forecast, used_s = self._entries[item]
        if worth is Worth.SUPERSEDED:
            return worth, 0.0, used_s
        return worth, forecast.rate(max(0.0, now_s - used_s)), used_s

    def _candidates(self) -> Iterable[R]:
        if len(self._live) <= SAMPLE:
            return self._live
        drawn = self._chance.choices(self._live, k=SAMPLE)
        earlier = [item for item in self._runners_up if item in self._places]
        return dict.fromkeys([*drawn, *earlier])

    def _drop_live(self, item: R) -> None:
        """The last one takes its place."""
        place = self._places.pop(item, None)
        if place is None:
            return
        last = self._live.pop()
        if last != item:
            self._live[place] = last
            self._places[last] = place

    def expired(self, deadline_s: float) -> list[R]:
        """Those last used before ``deadline_s``, oldest first."""
        found: list[R] = []
        for item, entry in self._entries.items():
            if entry.used_s >= deadline_s:
                break
            found.append(item)
        return found
