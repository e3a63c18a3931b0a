# SPDX-License-Identifier: Apache-2.0
"""What each session waits for, and what is learned when it comes back.

Waits are kept longer than KV: a session whose blocks were given back still shows how long it was
away.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm_stateful.schedule.gaps import LOST_S, Forecast, GapModel, OwnGaps, Wait, WaitKind

MAX_SESSIONS = 10_000
"""Sessions remembered; the one that ended its turn longest ago is forgotten."""


@dataclass(eq=False, slots=True)
class _Known:
    own: OwnGaps = field(default_factory=OwnGaps)
    tenant: Hashable = None
    wait: Wait | None = None
    """None while a turn runs."""
    since_s: float = 0.0
    is_lost: bool = False


class Ended(NamedTuple):
    """A wait that has ended, and how many seconds it took."""

    wait: Wait
    gap_s: float


class WaitBook:
    """The waits of one engine core. Not thread-safe. Times are those of one clock."""

    def __init__(self, max_sessions: int = MAX_SESSIONS) -> None:
        self.gaps = GapModel()
        self.num_began = dict.fromkeys(WaitKind, 0)
        """Waits so far, by kind."""
        self._max = max_sessions
        self._known: OrderedDict[Hashable, _Known] = OrderedDict()
        self._waiting: OrderedDict[Hashable, _Known] = OrderedDict()
        """Sessions that wait and do not count as lost. The one silent longest comes first."""

    def __len__(self) -> int:
        return len(self._known)

    def came_back(self, session: Hashable, now_s: float) -> Ended | None:
        """Learn from the arrival of a turn.

        Returns:
            The wait that has ended; None when the session is not known to wait.
        """
        known = self._known.get(session)
        if known is None or known.wait is None:
            return None
        gap_s = max(0.0, now_s - known.since_s)
        self.gaps.learn(known.tenant, known.wait, gap_s, was_lost=known.is_lost)
        known.own.add(known.wait.kind, gap_s)
        ended, known.wait = Ended(known.wait, gap_s), None
        self._waiting.pop(session, None)
        return ended

    def wait_of(self, session: Hashable) -> tuple[Wait, float] | None:
        """What a session waits for, and since when; None while a turn of it runs."""
        known = self._known.get(session)
        return None if known is None or known.wait is None else (known.wait, known.since_s)

    def began(
        self,
        session: Hashable,
        tenant: Hashable,
        wait: Wait,
        now_s: float,
        expected_s: float | None = None,
    ) -> Forecast:
        """Record that a turn ended and its session waits.

        Args:
            session: the key of the session.
            tenant: the tenant whose gaps the forecast uses.
            wait: what the session waits for now.
            now_s: when the turn ended.
            expected_s: the seconds that the client expects it to wait; None where it does not say.

        Returns:
            When the session is expected back.
        """
        self._settle(now_s)
        self.num_began[wait.kind] += 1
        known = self._known.get(session)
        if known is None:
            known = self._known[session] = _Known()
        self._known.move_to_end(session)
        known.tenant, known.wait, known.since_s, known.is_lost = tenant, wait, now_s, False
        self._waiting[session] = known
        self._waiting.move_to_end(session)
        while len(self._known) > self._max:
            forgotten, _ = self._known.popitem(last=False)
            self._waiting.pop(forgotten, None)
        return self.gaps.forecast(tenant, wait, known.own, expected_s)

    def closed(self, session: Hashable) -> None:
        """Forget a session that was closed. A session that waited counts as never come back."""
        known = self._known.pop(session, None)
        if self._waiting.pop(session, None) is not None:
            assert known is not None
            assert known.wait is not None
            self.gaps.learn_lost(known.tenant, known.wait)

    def _settle(self, now_s: float) -> None:
        """Count sessions as lost that have been silent for ``LOST_S``."""
        while self._waiting:
            session, known = next(iter(self._waiting.items()))
            if known.since_s + LOST_S > now_s:
                return
            del self._waiting[session]
            assert known.wait is not None
            known.is_lost = True
            self.gaps.learn_lost(known.tenant, known.wait)
