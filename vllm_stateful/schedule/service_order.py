# SPDX-License-Identifier: Apache-2.0
"""The order in which waiting turns are admitted: sessions that were served least go first.

The service of a session is what was computed for it so far. Tokens that a turn reused from the
cache were not computed and do not count. Sessions are compared by the level of their service.
Within a level, turns go in order of arrival: sessions of similar service are served first come,
first served. Turns that have waited for ``MAX_WAIT_S`` go before all others, in order of arrival,
so no turn starves. When every turn waits that long, all go in order of arrival.

Source: program-level attained service with multi-level queues, Autellix (arXiv:2502.13965), which
measures service in seconds of the engine.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T", bound=Hashable)

MAX_WAIT_S = 30.0
"""Seconds after which a turn goes before all that have waited less. A queue in which every turn
waits longer than this is served in order of arrival. At twice the capacity, a bound of 10 s keeps a
tenth of the slowdown that the order saves without a bound; 30 s keeps two thirds, with waits no
longer than in order of arrival (``benchmarks/policy/bench_order.py``)."""

OUTPUT_WEIGHT = 4
"""Prompt tokens that an output token counts as. APIs charge 3 to 5 times as much for one; for
fairness between clients 2 is usual (VTC, arXiv:2401.00588)."""

FIRST_LEVEL = 4096
"""Weighted tokens below which a session is in level 0. Each level ends at 4 times the end of the
level before."""

NUM_LEVELS = 6
"""Levels end at 4k, 16k, 64k, 256k and 1M weighted tokens; the last begins at 1M and has no end."""

MAX_SESSIONS = 10_000
"""Sessions remembered. The one that was served longest ago is forgotten and starts at 0 again."""

SLACK = 64
"""A heap is rebuilt when it has more than this plus twice as many entries as turns that wait."""


class Ticket(NamedTuple):
    """A turn's place in the order of arrival. A turn that is put back keeps its place."""

    number: int
    since_s: float
    session: Hashable | None
    """None for a turn without a session; its service is 0."""


class ServiceBook:
    """Weighted tokens that were computed for each session. O(1) per call. Not thread-safe."""

    def __init__(self, max_sessions: int = MAX_SESSIONS) -> None:
        self._max = max_sessions
        self._served: OrderedDict[Hashable, int] = OrderedDict()
        """Least recently served first."""

    def __len__(self) -> int:
        return len(self._served)

    def charge(self, session: Hashable | None, num_prompt: int = 0, num_output: int = 0) -> None:
        """Add computed prompt tokens and output tokens to a session; a no-op for None."""
        if session is None:
            return
        served = self._served.pop(session, 0)
        self._served[session] = served + num_prompt + OUTPUT_WEIGHT * num_output
        if len(self._served) > self._max:
            self._served.popitem(last=False)

    def served(self, session: Hashable | None) -> int:
        """The weighted tokens of a session so far; 0 for None and for an unknown session."""
        return 0 if session is None else self._served.get(session, 0)

    def level(self, session: Hashable | None) -> int:
        """The level of a session, from 0 (served least) to ``NUM_LEVELS - 1``."""
        width = self.served(session) // FIRST_LEVEL
        return min(NUM_LEVELS - 1, (width.bit_length() + 1) // 2)


class ServiceOrder(Generic[T]):
    """The waiting turns, and which one is next. Each operation is O(log n), amortized.

    All times are read from one clock. Once the next turn has been asked for, it stays the same
    until it is taken or another turn enters: neither time nor service changes it in between.

    Args:
        book: the service of each session. It may be charged at any time; the session's waiting
            turns then move back.
        max_wait_s: see ``MAX_WAIT_S``; 0 means an order by arrival.
    """

    def __init__(self, book: ServiceBook, max_wait_s: float = MAX_WAIT_S) -> None:
        self._book = book
        self._max_wait_s = max_wait_s
        self._waiting: dict[int, tuple[T, Ticket]] = {}
        """The waiting turns by the number of their ticket."""
        self._numbers: dict[T, int] = {}
        self._by_service: list[tuple[int, int]] = []
        """Heap of level and number. A level that is too low is corrected at the top."""
        self._by_arrival: list[int] = []
        """Heap of numbers. In both heaps, turns that are gone stay until they reach the top."""
        self._next: int | None = None
        self._count = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, item: object) -> bool:
        return item in self._numbers

    def add(self, item: T, session: Hashable | None, now_s: float) -> Ticket:
        """Add a turn that arrived. Raises ValueError when it waits already."""
        ticket = Ticket(next(self._count), now_s, session)
        self.put_back(item, ticket)
        return ticket

    def put_back(self, item: T, ticket: Ticket) -> None:
        """Put a turn that was taken back to its place. Raises ValueError when it waits already."""
        if item in self._numbers or ticket.number in self._waiting:
            raise ValueError("the turn waits already")
        self._waiting[ticket.number] = item, ticket
        self._numbers[item] = ticket.number
        heapq.heappush(self._by_service, (self._book.level(ticket.session), ticket.number))
        heapq.heappush(self._by_arrival, ticket.number)
        self._next = None
        self._tidy()

    def first(self, now_s: float) -> T:
        """The next turn. Raises IndexError when none waits."""
        if not self._waiting:
            raise IndexError("no turn waits")
        if self._next is None:
            self._next = self._choose(now_s)
        return self._waiting[self._next][0]

    def pop(self, now_s: float) -> T:
        """Take the next turn. Raises IndexError when none waits."""
        item = self.first(now_s)
        self.discard(item)
        return item

    def discard(self, item: T) -> bool:
        """Take a turn out, wherever it is; False when it does not wait."""
        number = self._numbers.pop(item, None)
        if number is None:
            return False
        del self._waiting[number]
        if number == self._next:
            self._next = None
        self._tidy()
        return True

    def in_order(self, now_s: float) -> list[T]:
        """All turns in the order in which ``pop`` would return them now. O(n log n)."""

        def rank(number: int) -> tuple[bool, bool, int, int]:
            ticket = self._waiting[number][1]
            if self._has_waited(ticket, now_s):
                return number != self._next, False, 0, number
            return number != self._next, True, self._book.level(ticket.session), number

        return [self._waiting[number][0] for number in sorted(self._waiting, key=rank)]

    def _has_waited(self, ticket: Ticket, now_s: float) -> bool:
        return now_s - ticket.since_s >= self._max_wait_s

    def _choose(self, now_s: float) -> int:
        while self._by_arrival[0] not in self._waiting:
            heapq.heappop(self._by_arrival)
        oldest = self._by_arrival[0]
        if self._has_waited(self._waiting[oldest][1], now_s):
            return oldest
        while True:
            level, number = self._by_service[0]
            if number not in self._waiting:
                heapq.heappop(self._by_service)
                continue
            now_level = self._book.level(self._waiting[number][1].session)
            if now_level <= level:
                return number
            heapq.heapreplace(self._by_service, (now_level, number))

    def _tidy(self) -> None:
        """Rebuild a heap when most of its entries are turns that are gone."""
        most = SLACK + 2 * len(self._waiting)
        if len(self._by_arrival) > most:
            self._by_arrival = sorted(self._waiting)
        if len(self._by_service) > most:
            self._by_service = sorted(
                (self._book.level(ticket.session), number)
                for number, (_, ticket) in self._waiting.items()
            )
