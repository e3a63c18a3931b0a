# SPDX-License-Identifier: Apache-2.0
"""Whose residencies go first: no tenant pushes out what is another's share.

While several tenants keep something, only those give back that hold more than an equal part of what
is kept; among these, and where nobody does, the order is that of ``schedule.retention``. What was
superseded goes first, whoever's it is: nobody waits for it.

Wishes (``retention.Worth.WISHED``) count while all that is wished for fits in ``max_wished``
blocks. Where clients wish for more than that, what is expected decides among all of them.

A cache salt makes a tenant, and a client may choose one for each session. With more tenants than
``MANY`` the one that holds most gives first, so that a choice never looks at all of them.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Generic, NamedTuple, TypeVar

from vllm_stateful.schedule.gaps import Forecast
from vllm_stateful.schedule.retention import Rank, RetentionQueue, Worth

R = TypeVar("R", bound=Hashable)

MANY = 4
"""Tenants that are all looked at."""


class _Held(NamedTuple):
    tenant: Hashable
    num_blocks: int
    looked_at_s: float
    """When it was last used, or found to have a wish that is not over."""
    wished_until_s: float


class FairQueue(Generic[R]):
    """A ``RetentionQueue`` for each tenant. Choosing a victim looks at the first of each.

    Args:
        max_wished: blocks up to which wishes count.
    """

    def __init__(self, max_wished: float = math.inf) -> None:
        self.max_wished = max_wished
        self.num_wished = 0
        """Blocks that are kept by those with a wish, over or not."""
        self._queues: dict[Hashable, RetentionQueue[R]] = {}
        self._held: OrderedDict[R, _Held] = OrderedDict()
        """By the time in it."""
        self._num_blocks: dict[Hashable, int] = {}
        self._total = 0
        self._largest: list[tuple[int, int, Hashable]] = []
        self._number = itertools.count()

    def __len__(self) -> int:
        return len(self._held)

    def add(
        self,
        item: R,
        *,
        tenant: Hashable,
        num_blocks: int,
        worth: Worth,
        forecast: Forecast,
        now_s: float,
        wished_until_s: float = 0.0,
    ) -> None:
        """Enter ``item``, which keeps so many blocks, as used now."""
        self.discard(item)
        self._held[item] = _Held(tenant, num_blocks, now_s, wished_until_s)
        self._count(self._held[item], num_blocks)
        queue = self._queues.setdefault(tenant, RetentionQueue())
        queue.add(item, worth, forecast, now_s, wished_until_s)

    def shrink(self, item: R, num_blocks: int) -> None:
        """``item`` gave some of its blocks back and keeps so many. A no-op when it is not in."""
        held = self._held.get(item)
        if held is not None:
            self._count(held, num_blocks - held.num_blocks)
            self._held[item] = held._replace(num_blocks=num_blocks)

    def discard(self, item: R) -> None:
        """Take ``item`` out; a no-op when it is not in."""
        held = self._held.pop(item, None)
        if held is None:
            return
        self._count(held, -held.num_blocks)
        queue = self._queues[held.tenant]
        queue.discard(item)
        if not len(queue):
            del self._queues[held.tenant]
            del self._num_blocks[held.tenant]

    def supersede(self, item: R) -> None:
        """Let ``item`` go before all that are live; a no-op when it is not in."""
        held = self._held.get(item)
        if held is not None:
            self._queues[held.tenant].supersede(item)

    def next_victim(self, now_s: float, keep: R | None = None) -> R | None:
        """The residency to demote first, sparing ``keep``; None when nothing is left."""
        if len(self._queues) > MANY:
            found = self._first_of([self._largest_holder()], now_s, keep)
            if found is not None:
                return found
        return self._first_of(self._queues, now_s, keep)

    def rank(self, item: R, now_s: float) -> Rank:
        """What ``item`` is compared by within its tenant.

        Raises:
            KeyError: it is not in.
        """
        queue = self._queues[self._held[item].tenant]
        return queue.rank(item, now_s, wishes=self.num_wished <= self.max_wished)

    def _first_of(self, tenants: Iterable[Hashable], now_s: float, keep: R | None) -> R | None:
        firsts = []
        wishes = self.num_wished <= self.max_wished
        for tenant in tenants:
            queue = self._queues[tenant]
            item = queue.next_victim(now_s, keep, wishes=wishes)
            if item is not None:
                firsts.append((queue.rank(item, now_s, wishes=wishes), tenant, item))
        if not firsts:
            return None
        best = min(firsts, key=lambda first: first[0])
        if best[0][0] is not Worth.SUPERSEDED:
            part = self._total / len(self._queues)
            above = [first for first in firsts if self._num_blocks[first[1]] > part]
            best = min(above or firsts, key=lambda first: first[0])
        return best[2]

    def _largest_holder(self) -> Hashable:
        while True:
            negative, _, tenant = self._largest[0]
            if self._num_blocks.get(tenant) == -negative:
                return tenant
            heapq.heappop(self._largest)

    def _count(self, holder: _Held, num_blocks: int) -> None:
        tenant = holder.tenant
        self._total += num_blocks
        self.num_wished += num_blocks if holder.wished_until_s else 0
        held = self._num_blocks[tenant] = self._num_blocks.get(tenant, 0) + num_blocks
        heapq.heappush(self._largest, (-held, next(self._number), tenant))
        if len(self._largest) > 64 + 4 * len(self._num_blocks):
            self._largest = [
                (-blocks, next(self._number), each) for each, blocks in self._num_blocks.items()
            ]
            heapq.heapify(self._largest)

    def expired(self, deadline_s: float, now_s: float) -> list[R]:
        """Those last used before ``deadline_s``, oldest first; not those with a wish that lasts.

        Costs what is found: a wish is looked at again after as long as it was silent.
        """
        found: list[R] = []
        wished: list[R] = []
        for item, held in self._held.items():
            if held.looked_at_s >= deadline_s:
                break
            (wished if held.wished_until_s > now_s else found).append(item)
        for item in wished:
            self._held[item] = self._held[item]._replace(looked_at_s=now_s)
            self._held.move_to_end(item)
        return found
