# SPDX-License-Identifier: Apache-2.0
"""The order in which waiting turns are admitted: those of sessions that were served least go first.

The service of a session is what was computed for it so far. What a turn reused from the cache was
not computed and counts nothing. Services are compared by level, and within a
level turns go by arrival: among sessions of similar service it is first come, first served. A turn
that has waited for ``MAX_WAIT_S`` goes by arrival before all that have not, so nobody starves; when
every turn waits for that long, all go by arrival.

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
"""Seconds after which a turn goes before all that have waited less. A queue that is longer than
that is served by arrival. Of the slowdown that an order without a bound saves at twice the capacity
10 s keep a tenth and 30 s two thirds, where waits are no longer than by arrival
(``benchmarks/policy/bench_order.py``)."""

OUTPUT_WEIGHT = 4
"""Prompt tokens that an output token counts as. APIs charge 3 to 5 times as much for one; for
fairness between clients 2 is usual (VTC, arXiv:2401.00588)."""

FIRST_LEVEL = 4096
"""Weighted tokens below which a session is in level 0; each level ends at 4 times the last."""

NUM_LEVELS = 6
"""The last one has no end and begins at 1M: 4k, 16k, 64k, 256k, 1M weighted tokens."""

MAX_SESSIONS = 10_000
"""Sessions remembered; the one that was served longest ago is forgotten and starts at 0."""

SLACK = 64
"""Entries of turns that are gone that a heap may hold beside twice those that wait."""


class Ticket(NamedTuple):
    """A turn's place by arrival; it keeps it when it is put back."""

    number: int
    since_s: float
    session: Hashable | None
    """None for a turn of its own: service 0."""


class ServiceBook:
    """What was computed for each session: weighted tokens, O(1) per entry. Not thread-safe."""

    def __init__(self, max_sessions: int = MAX_SESSIONS) -> None:
        self._max = max_sessions
        self._served: OrderedDict[Hashable, int] = OrderedDict()
        """Least recently served first."""

    def __len__(self) -> int:
        return len(self._served)

    def charge(self, session: Hashable | None, num_prompt: int = 0, num_output: int = 0) -> None:
        """Count so many prompt tokens that were computed, and output tokens. Nothing for None."""
        if session is None:
            return
        served = self._served.pop(session, 0)
        self._served[session] = served + num_prompt + OUTPUT_WEIGHT * num_output
        if len(self._served) > self._max:
            self._served.popitem(last=False)

    def served(self, session: Hashable | None) -> int:
        """Weighted tokens so far; 0 for None and for a session that is not known."""
        return 0 if session is None else self._served.get(session, 0)

    def level(self, session: Hashable | None) -> int:
        """From 0, served least, to ``NUM_LEVELS - 1``."""
        width = self.served(session) // FIRST_LEVEL
        return min(NUM_LEVELS - 1, (width.bit_length() + 1) // 2)


class ServiceOrder(Generic[T]):
    """Waiting turns and which is next. Each operation is O(log n), amortized.

    Times are those of one clock. Once asked for, the next turn stays the same until it is taken or
    another one enters: neither time nor service changes it in between.

    Args:
        book: the service; may be charged at any time, and waiting turns sink with it.
        max_wait_s: seconds; 0 makes it an order by arrival.
    """

    def __init__(self, book: ServiceBook, max_wait_s: float = MAX_WAIT_S) -> None:
        self._book = book
        self._max_wait_s = max_wait_s
        self._waiting: dict[int, tuple[T, Ticket]] = {}
        """By number."""
        self._numbers: dict[T, int] = {}
        self._by_service: list[tuple[int, int]] = []
        """Heap of level and number. A level may be too low: it is corrected at the top."""
        self._by_arrival: list[int] = []
        """Heap of numbers. Both heaps hold turns that are gone, until these reach the top."""
        self._next: int | None = None
        self._count = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, item: object) -> bool:
        return item in self._numbers

    def add(self, item: T, session: Hashable | None, now_s: float) -> Ticket:
        """A turn arrived. Raises ValueError when it waits already."""
        ticket = Ticket(next(self._count), now_s, session)
        self.put_back(item, ticket)
        return ticket

    def put_back(self, item: T, ticket: Ticket) -> None:
        """A turn that was taken goes back to its place. Raises ValueError when it waits already."""
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
        """All turns as ``pop`` would give them if time stood still; O(n log n)."""

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
        """Drop what is gone once it is the most of a heap."""
        most = SLACK + 2 * len(self._waiting)
        if len(self._by_arrival) > most:
            self._by_arrival = sorted(self._waiting)
        if len(self._by_service) > most:
            self._by_service = sorted(
                (self._book.level(ticket.session), number)
                for number, (_, ticket) in self._waiting.items()
            )
