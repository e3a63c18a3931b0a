# SPDX-License-Identifier: Apache-2.0
"""The order in which idle residencies give their blocks back.

Superseded histories go first, in the order in which they were superseded, and those that their
client asked to keep (``Worth.WISHED``) last, as long as the wish lasts. Among equals the one goes
first whose return is expected least, per second for which its blocks would be kept
(``schedule.gaps``). What is expected changes all the time, so nothing is kept in order: of up to
``SAMPLE`` residencies all are looked at, of more a random sample of that size and the worst of
earlier samples. Every operation is O(1).

Source: sampled eviction as in least hit density (Beckmann et al., NSDI'18) and Redis.
"""

from __future__ import annotations

import heapq
import itertools
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
    WISHED = 2
    """Its client asked to keep it for some time (``request.retention_wish``), which is not over."""


class _Entry(NamedTuple):
    worth: Worth
    forecast: Forecast
    used_s: float
    wished_until_s: float


Rank = tuple[Worth, float, float]
"""Smaller goes first: class, rate of return, last use."""


class _Bag(Generic[R]):
    """Items in no order; drawing, adding and taking out are O(1)."""

    def __init__(self) -> None:
        self.items: list[R] = []
        self._places: dict[R, int] = {}

    def __contains__(self, item: R) -> bool:
        return item in self._places

    def place(self, item: R) -> int:
        return self._places[item]

    def add(self, item: R) -> None:
        self._places[item] = len(self.items)
        self.items.append(item)

    def discard(self, item: R) -> None:
        """The last one takes its place."""
        place = self._places.pop(item, None)
        if place is None:
            return
        last = self.items.pop()
        if last != item:
            self.items[place] = last
            self._places[last] = place


class RetentionQueue(Generic[R]):
    """Idle residencies, and which goes first. Times are those of one clock."""

    def __init__(self) -> None:
        self._entries: dict[R, _Entry] = {}
        self._superseded: OrderedDict[R, None] = OrderedDict()
        self._bags: dict[Worth, _Bag[R]] = {Worth.LIVE: _Bag(), Worth.WISHED: _Bag()}
        self._runners_up: dict[Worth, list[R]] = {Worth.LIVE: [], Worth.WISHED: []}
        self._wishes: list[tuple[float, int, R]] = []
        """Heap of when wishes end; may name what is gone or was renewed."""
        self._number = itertools.count()
        self._chance: random.Random | None = None
        """Made when it is needed: it is large, and most queues are short."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: R) -> bool:
        return item in self._entries

    def add(
        self,
        item: R,
        worth: Worth,
        forecast: Forecast,
        now_s: float,
        wished_until_s: float = 0.0,
    ) -> None:
        """Enter ``item`` as used now. A wish that is not over makes a live one WISHED."""
        self.discard(item)
        if worth is not Worth.SUPERSEDED:
            worth = Worth.WISHED if wished_until_s > now_s else Worth.LIVE
        self._entries[item] = _Entry(worth, forecast, now_s, wished_until_s)
        if worth is Worth.SUPERSEDED:
            self._superseded[item] = None
            return
        self._bags[worth].add(item)
        if worth is Worth.WISHED:
            heapq.heappush(self._wishes, (wished_until_s, next(self._number), item))

    def discard(self, item: R) -> None:
        """Take ``item`` out; a no-op when it is not in."""
        if self._entries.pop(item, None) is not None:
            self._superseded.pop(item, None)
            self._unbag(item)

    def supersede(self, item: R) -> None:
        """Let ``item`` go before all that are live; a no-op when it is not in."""
        entry = self._entries.get(item)
        if entry is not None:
            self._entries[item] = entry._replace(worth=Worth.SUPERSEDED)
            self._superseded[item] = None
            self._unbag(item)

    def next_victim(self, now_s: float, keep: R | None = None, *, wishes: bool = True) -> R | None:
        """The residency to demote first, sparing ``keep``; None when nothing is left.

        Args:
            now_s: the time.
            keep: is spared.
            wishes: whether those that were wished for go after all others.
        """
        for item in self._superseded:
            if item != keep:
                return item
        self._end_wishes(now_s)
        worst = [self._worst(worth, now_s, keep) for worth in self._bags]
        found = [item for item in worst if item is not None]
        return min(found, key=lambda item: self.rank(item, now_s, wishes=wishes), default=None)

    def rank(self, item: R, now_s: float, *, wishes: bool = True) -> Rank:
        """What ``item`` is compared by.

        Raises:
            KeyError: it is not in.
        """
        worth, forecast, used_s, _ = self._entries[item]
        if worth is Worth.SUPERSEDED:
            return worth, 0.0, used_s
        worth = worth if wishes else Worth.LIVE
        return worth, forecast.rate(max(0.0, now_s - used_s)), used_s

    def _worst(self, worth: Worth, now_s: float, keep: R | None) -> R | None:
        bag = self._bags[worth]
        ranked = sorted(
            (self.rank(item, now_s), bag.place(item))
            for item in self._candidates(bag, worth)
            if item != keep
        )
        worst = [bag.items[place] for _, place in ranked[: 1 + NUM_RUNNERS_UP]]
        self._runners_up[worth] = worst
        return worst[0] if worst else None

    def _candidates(self, bag: _Bag[R], worth: Worth) -> Iterable[R]:
        if len(bag.items) <= SAMPLE:
            return bag.items
        if self._chance is None:
            self._chance = random.Random(0)
        drawn = self._chance.choices(bag.items, k=SAMPLE)
        earlier = [item for item in self._runners_up[worth] if item in bag]
        return dict.fromkeys([*drawn, *earlier])

    def _unbag(self, item: R) -> None:
        for bag in self._bags.values():
            bag.discard(item)

    def _end_wishes(self, now_s: float) -> None:
        """Wishes that are over leave an ordinary waiting session."""
        while self._wishes and self._wishes[0][0] <= now_s:
            item = heapq.heappop(self._wishes)[2]
            entry = self._entries.get(item)
            if entry is None or entry.worth is not Worth.WISHED or entry.wished_until_s > now_s:
                continue
            self._entries[item] = entry._replace(worth=Worth.LIVE)
            self._unbag(item)
            self._bags[Worth.LIVE].add(item)
        if len(self._wishes) > 64 + 4 * len(self._bags[Worth.WISHED].items):
            self._wishes = [
                (self._entries[item].wished_until_s, next(self._number), item)
                for item in self._bags[Worth.WISHED].items
            ]
            heapq.heapify(self._wishes)
