# SPDX-License-Identifier: Apache-2.0
"""Which tenant's residencies go first. No tenant pushes out another tenant's share.

While several tenants keep residencies, only tenants that hold more than an equal part of all kept
blocks give some back. Among those tenants, and where no tenant is above its part, the order is that
of ``schedule.retention``. Superseded residencies go first, whoever owns them: nobody waits for
them.

A tenant is an API key. Within a tenant, its cache salts share in the same way, but a salt's part is
never less than a quarter of what the tenant keeps. A client may choose one salt per conversation.
Equal parts would then mean "the longest goes first". So a salt with a single residency never has to
give before the others of its tenant: salts with one residency each are ordered as if there were no
salts.

Wishes (``retention.Worth.WISHED``) count while everything wished for fits in ``max_wished`` blocks.
When clients wish for more, wishes are ignored and the forecasts decide.

Choosing looks only at the ``MANY`` tenants that hold most, and at the ``MANY`` largest salts of
each.
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
"""Tenants that a choice looks at, and salts per tenant. A salt's part of what its tenant keeps is
at least one in ``MANY``."""


class _Held(NamedTuple):
    tenant: Hashable
    salt: Hashable
    num_blocks: int
    looked_at_s: float
    """When it was last used, or last seen to have a wish that still runs."""
    wished_until_s: float


class _Shares:
    """The number of blocks that each holder keeps, and which holders keep most."""

    def __init__(self) -> None:
        self.total = 0
        self.num_blocks: dict[Hashable, int] = {}
        self._heap: list[tuple[int, int, Hashable]] = []
        """Largest first. Entries of holders that have changed or are gone may remain."""
        self._number = itertools.count()

    def add(self, holder: Hashable, num_blocks: int) -> None:
        """Add ``num_blocks``, which may be negative, to what a holder keeps."""
        self.total += num_blocks
        held = self.num_blocks[holder] = self.num_blocks.get(holder, 0) + num_blocks
        heapq.heappush(self._heap, (-held, next(self._number), holder))
        if len(self._heap) > 64 + 4 * len(self.num_blocks):
            self._heap = [
                (-blocks, next(self._number), each) for each, blocks in self.num_blocks.items()
            ]
            heapq.heapify(self._heap)

    def drop(self, holder: Hashable) -> None:
        """Remove a holder that keeps nothing any more."""
        self.total -= self.num_blocks.pop(holder)

    def largest(self) -> list[Hashable]:
        """The ``MANY`` holders that keep most, or all holders if there are fewer."""
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
    """Everything that one tenant keeps, and what each of its salts keeps."""

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

    def salts_above(self) -> list[Hashable]:
        """The salts above their part, which give before the others."""
        part = self.shares.total / min(MANY, len(self.salts))
        return [
            salt
            for salt in self.shares.largest()
            if self.shares.num_blocks[salt] > part and len(self.salts[salt]) > 1
        ]

    def next_victim(self, now_s: float, keep: R | None, *, wishes: bool) -> R | None:
        """The first victim of the salts above their part; of all residencies if no salt is."""
        above = [self.salts[salt] for salt in self.salts_above()]
        found = [queue.next_victim(now_s, keep, wishes=wishes) for queue in above or [self.queue]]
        return min(
            (item for item in found if item is not None),
            key=lambda item: self.queue.rank(item, now_s, wishes=wishes),
            default=None,
        )


class FairQueue(Generic[R]):
    """A ``RetentionQueue`` for each tenant. Choosing a victim compares the first of each.

    Args:
        max_wished: wishes count while those with a wish keep at most this many blocks.
    """

    def __init__(self, max_wished: float = math.inf) -> None:
        self.max_wished = max_wished
        self.num_wished = 0
        """Blocks kept by residencies with a wish, including wishes that are over."""
        self._tenants: dict[Hashable, _Tenant[R]] = {}
        self._shares = _Shares()
        self._held: OrderedDict[R, _Held] = OrderedDict()
        """Ordered by ``looked_at_s``, oldest first."""
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
            item: the residency. An earlier entry of it is replaced.
            tenant: its tenant (``types.tenant_of_salt``); tenants share with each other.
            num_blocks: the number of blocks that it keeps.
            worth: its class.
            forecast: when its session is expected back.
            now_s: the time, in seconds.
            wished_until_s: the time until which its client asked to keep it; 0 without a wish.
            salt: its cache salt; the salts of one tenant share with each other.
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
        """Record that ``item`` keeps ``num_blocks`` after giving some back. A no-op if not in."""
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
        """Move ``item`` in front of all live residencies; a no-op when it is not in."""
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
        firsts: list[tuple[bool, Rank, R]] = []
        for name in self._shares.largest():
            tenant = self._tenants[name]
            first = tenant.next_victim(now_s, keep, wishes=wishes)
            if first is not None:
                rank = tenant.queue.rank(first, now_s, wishes=wishes)
                firsts.append((self._is_within(name), rank, first))
        best = min(firsts, key=lambda first: first[:2], default=None)
        return None if best is None else best[2]

    def rank(self, item: R, now_s: float) -> Rank:
        """The key by which ``item`` is compared within its tenant.

        Raises:
            KeyError: it is not in.
        """
        queue = self._tenants[self._held[item].tenant].queue
        return queue.rank(item, now_s, wishes=self.num_wished <= self.max_wished)

    def order(self, now_s: float) -> list[R]:
        """All residencies, the first to go first, as if no share changed while they go.

        O(n log n). For people: choosing one looks at a sample if there are many.
        """
        is_within = {name: self._is_within(name) for name in self._tenants}
        above = {name: set(tenant.salts_above()) for name, tenant in self._tenants.items()}

        def key(item: R) -> tuple[bool, bool, Rank]:
            held = self._held[item]
            is_later = bool(above[held.tenant]) and held.salt not in above[held.tenant]
            return is_within[held.tenant], is_later, self.rank(item, now_s)

        others = (item for item in self._held if item not in self._superseded)
        return [*self._superseded, *sorted(others, key=key)]

    def _is_within(self, name: Hashable) -> bool:
        """Whether a tenant keeps no more than an equal part."""
        return self._shares.num_blocks[name] <= self._shares.total / len(self._tenants)

    def _count(self, held: _Held, num_blocks: int) -> None:
        """Add ``num_blocks``, which may be negative, to all totals that count ``held``."""
        self.num_wished += num_blocks if held.wished_until_s else 0
        self._shares.add(held.tenant, num_blocks)
        self._tenants[held.tenant].shares.add(held.salt, num_blocks)

    def expired(self, deadline_s: float, now_s: float) -> list[R]:
        """Residencies last used before ``deadline_s``, oldest first, without those under a wish.

        O(residencies found). One under a wish goes to the end of the order, as if used now, so it
        is looked at again only when it has been silent for as long once more.
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
