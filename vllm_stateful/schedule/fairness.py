# SPDX-License-Identifier: Apache-2.0
"""Which tenant's residencies go first. No tenant pushes out another tenant's share.

While several tenants keep something, only those give back that hold more than an equal part of what
is kept; among these, and where nobody does, the order is that of ``schedule.retention``. What was
superseded goes first, whoever's it is: nobody waits for it.

A tenant is an API key. Within it, cache salts share in the same way, down to a quarter of what the
tenant keeps. But a client may choose a salt for each of its conversations, and then an equal part
would be the same as "longest first". So a salt that keeps one residency is never asked before the
others of its tenant: salts that keep one each go in the order that they had without any.

Wishes (``retention.Worth.WISHED``) count while all that is wished for fits in ``max_wished``
blocks. Where clients wish for more than that, what is expected decides among all of them.

Choosing looks at no more than the ``MANY`` tenants that hold most, and as many salts of each.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

from vllm_stateful.schedule.gaps import Forecast
from vllm_stateful.schedule.retention import Rank, RetentionQueue, Worth

R = TypeVar("R", bound=Hashable)

MANY = 4
"""Tenants that are looked at, and salts of one; a salt's part is at least one of so many."""


class _Held(NamedTuple):
    tenant: Hashable
    salt: Hashable
    num_blocks: int
    looked_at_s: float
    """When it was last used, or found to have a wish that is not over."""
    wished_until_s: float


class _Shares:
    """How many blocks each of several holders keeps, and who keeps most."""

    def __init__(self) -> None:
        self.total = 0
        self.num_blocks: dict[Hashable, int] = {}
        self._heap: list[tuple[int, int, Hashable]] = []
        """The largest first; may name what has changed or is gone."""
        self._number = itertools.count()

    def add(self, holder: Hashable, num_blocks: int) -> None:
        """The holder keeps so many blocks more, or less."""
        self.total += num_blocks
        held = self.num_blocks[holder] = self.num_blocks.get(holder, 0) + num_blocks
        heapq.heappush(self._heap, (-held, next(self._number), holder))
        if len(self._heap) > 64 + 4 * len(self.num_blocks):
            self._heap = [
                (-blocks, next(self._number), each) for each, blocks in self.num_blocks.items()
            ]
            heapq.heapify(self._heap)

    def drop(self, holder: Hashable) -> None:
        """The holder keeps nothing."""
        self.total -= self.num_blocks.pop(holder)

    def largest(self) -> list[Hashable]:
        """The ``MANY`` that keep most, or all that there are."""
        if len(self.num_blocks) <= MANY:
            return list(self.num_blocks)
        found: dict[Hashable, tuple[int, int, Hashable]] = {}
        while len(found) < MANY:
            entry = heapq.heappop(self._heap)
            if self.num_blocks.get(entry[2]) == -entry[0]:
                found.setdefault(entry[2], entry)
        for entry in found.values():
            heapq.heappush(self._heap, entry)
        return list(found)


class _Tenant(Generic[R]):
    """All that one tenant keeps, and what each of its salts does."""

    def __init__(self) -> None:
        self.queue: RetentionQueue[R] = RetentionQueue()
        self.salts: dict[Hashable, RetentionQueue[R]] = {}
        self.shares = _Shares()

    def queues(self, salt: Hashable) -> tuple[RetentionQueue[R], RetentionQueue[R]]:
        """The two queues that hold a residency of this salt."""
        of_salt = self.salts.get(salt)
        if of_salt is None:
            of_salt = self.salts[salt] = RetentionQueue()
        return self.queue, of_salt

    def discard(self, item: R, salt: Hashable) -> None:
        for queue in self.queues(salt):
            queue.discard(item)
        if not len(self.salts[salt]):
            del self.salts[salt]
            self.shares.drop(salt)

    def next_victim(self, now_s: float, keep: R | None, *, wishes: bool) -> R | None:
        """The first of the salts above their part; of all where there is none."""
        part = self.shares.total / min(MANY, len(self.salts))
        above = [
            self.salts[salt]
            for salt in self.shares.largest()
            if self.shares.num_blocks[salt] > part and len(self.salts[salt]) > 1
        ]
        found = [queue.next_victim(now_s, keep, wishes=wishes) for queue in above or [self.queue]]
        return min(
            (item for item in found if item is not None),
            key=lambda item: self.queue.rank(item, now_s, wishes=wishes),
            default=None,
        )


class FairQueue(Generic[R]):
    """A ``RetentionQueue`` for each tenant. Choosing a victim looks at the first of each.

    Args:
        max_wished: blocks up to which wishes count.
    """

    def __init__(self, max_wished: float = math.inf) -> None:
        self.max_wished = max_wished
        self.num_wished = 0
        """Blocks that are kept by those with a wish, over or not."""
        self._tenants: dict[Hashable, _Tenant[R]] = {}
        self._shares = _Shares()
        self._held: OrderedDict[R, _Held] = OrderedDict()
        """By the time in it."""
        self._superseded: OrderedDict[R, None] = OrderedDict()
        """The superseded residencies of all tenants, in the order in which they became so."""

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
        salt: Hashable = None,
    ) -> None:
        """Enter ``item`` as used now.

        Args:
            item: the residency; it is taken out first where it is in.
            tenant: who shares with others (``types.tenant_of_salt``).
            num_blocks: what it keeps.
            worth: its class.
            forecast: when its session is expected back.
            now_s: the time, seconds.
            wished_until_s: until then its client asked to keep it; 0 without a wish.
            salt: who shares within the tenant: its cache salt.
        """
        self.discard(item)
        held = self._held[item] = _Held(tenant, salt, num_blocks, now_s, wished_until_s)
        if tenant not in self._tenants:
            self._tenants[tenant] = _Tenant()
        for queue in self._tenants[tenant].queues(salt):
            queue.add(item, worth, forecast, now_s, wished_until_s)
        self._count(held, num_blocks)
        if worth is Worth.SUPERSEDED:
            self._superseded[item] = None

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
        self._superseded.pop(item, None)
        tenant = self._tenants[held.tenant]
        tenant.discard(item, held.salt)
        if not len(tenant.queue):
            del self._tenants[held.tenant]
            self._shares.drop(held.tenant)

    def supersede(self, item: R) -> None:
        """Let ``item`` go before all that are live; a no-op when it is not in."""
        held = self._held.get(item)
        if held is not None:
            self._superseded[item] = None
            for queue in self._tenants[held.tenant].queues(held.salt):
                queue.supersede(item)

    def next_victim(self, now_s: float, keep: R | None = None) -> R | None:
        """The residency to demote first, sparing ``keep``; None when nothing is left."""
        for item in self._superseded:
            if item != keep:
                return item
        if not self._tenants:
            return None
        wishes = self.num_wished <= self.max_wished
        part = self._shares.total / len(self._tenants)
        firsts: list[tuple[bool, Rank, R]] = []
        for name in self._shares.largest():
            tenant = self._tenants[name]
            first = tenant.next_victim(now_s, keep, wishes=wishes)
            if first is not None:
                is_within = self._shares.num_blocks[name] <= part
                firsts.append((is_within, tenant.queue.rank(first, now_s, wishes=wishes), first))
        best = min(firsts, key=lambda first: first[:2], default=None)
        return None if best is None else best[2]

    def rank(self, item: R, now_s: float) -> Rank:
        """What ``item`` is compared by within its tenant.

        Raises:
            KeyError: it is not in.
        """
        queue = self._tenants[self._held[item].tenant].queue
        return queue.rank(item, now_s, wishes=self.num_wished <= self.max_wished)

    def _count(self, held: _Held, num_blocks: int) -> None:
        """So many blocks more, or less."""
        self.num_wished += num_blocks if held.wished_until_s else 0
        self._shares.add(held.tenant, num_blocks)
        self._tenants[held.tenant].shares.add(held.salt, num_blocks)

    def expired(self, deadline_s: float, now_s: float) -> list[R]:
        """Residencies last used before ``deadline_s``, oldest first, without those under a wish.

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
