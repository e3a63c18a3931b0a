# SPDX-License-Identifier: Apache-2.0
"""The order in which idle residencies give their blocks back.

Superseded residencies go first, in the order in which they were superseded. Residencies that a
client asked to keep (``Worth.WISHED``) go last while the wish lasts. Within a class, the residency
with the lowest rate of return goes first: the chance that its session comes back, per second for
which its blocks would be kept (``schedule.gaps``). This rate changes with time, so no sorted order
is kept. Of up to ``SAMPLE`` residencies all are looked at; of more, a random sample of that size
and the worst of the sample before. Every operation is O(1).

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
"""Residencies that are looked at to choose one. The chosen one is among the worst few percent."""

NUM_RUNNERS_UP = 8
"""The next worst of a sample, which are looked at again together with the next sample."""


class Worth(IntEnum):
    """Retention classes, worst first."""

    SUPERSEDED = 0
    """A later turn of the session edited this history away."""
    LIVE = 1
    """Its session may come back."""
    WISHED = 2
    """Its client asked to keep it for a time that is not over (``request.retention_wish``)."""


class _Entry(NamedTuple):
    worth: Worth
    forecast: Forecast
    used_s: float
    wished_until_s: float


Rank = tuple[Worth, float, float]
"""Smaller goes first: class, rate of return, last use."""


class _Bag(Generic[R]):
    """Items in no order. Adding, discarding and drawing at random are O(1)."""

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
        """Take ``item`` out; the last item moves to its place. A no-op when it is not in."""
        place = self._places.pop(item, None)
        if place is None:
            return
        last = self.items.pop()
        if last != item:
            self.items[place] = last
            self._places[last] = place


class RetentionQueue(Generic[R]):
    """Idle residencies, and which goes first. All times are read from one clock."""

    def __init__(self) -> None:
        self._entries: dict[R, _Entry] = {}
        self._superseded: OrderedDict[R, None] = OrderedDict()
        self._bags: dict[Worth, _Bag[R]] = {Worth.LIVE: _Bag(), Worth.WISHED: _Bag()}
        self._runners_up: dict[Worth, list[R]] = {Worth.LIVE: [], Worth.WISHED: []}
        self._wishes: list[tuple[float, int, R]] = []
        """Heap of the times at which wishes end. Entries that are gone or renewed may remain."""
        self._number = itertools.count()
        self._chance: random.Random | None = None
        """Created when first needed: it is large, and most queues are short."""

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
        """Enter ``item`` as used now. A live item whose wish is not over becomes WISHED."""
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
        """Move ``item`` in front of all live residencies; a no-op when it is not in."""
        entry = self._entries.get(item)
        if entry is not None:
            self._entries[item] = entry._replace(worth=Worth.SUPERSEDED)
            self._superseded[item] = None
            self._unbag(item)

    def next_victim(self, now_s: float, keep: R | None = None, *, wishes: bool = True) -> R | None:
        """The residency to demote first; None when nothing is left.

        Args:
            now_s: the time.
            keep: a residency that is never chosen.
            wishes: whether residencies with a wish go after all others.
        """
        for item in self._superseded:
            if item != keep:
                return item
        self._end_wishes(now_s)
        worst = [self._worst(worth, now_s, keep) for worth in self._bags]
        found = [item for item in worst if item is not None]
        return min(found, key=lambda item: self.rank(item, now_s, wishes=wishes), default=None)

    def rank(self, item: R, now_s: float, *, wishes: bool = True) -> Rank:
        """The key by which ``item`` is compared.

        Raises:
            KeyError: it is not in.
        """
        worth, forecast, used_s, wished_until_s = self._entries[item]
        if worth is Worth.SUPERSEDED:
            return worth, 0.0, used_s
        worth = worth if wishes and wished_until_s > now_s else Worth.LIVE
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
        """Make residencies whose wish is over ordinary live ones."""
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
