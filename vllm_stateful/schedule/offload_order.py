# SPDX-License-Identifier: Apache-2.0
"""Which chunks an offload tier gives up first, and which sessions it takes in at all.

A chunk belongs to every session whose last prompt contained it. It goes when the last of these
sessions gives it up. Sessions give up chunks in the same order as the GPU's residencies: the
session that is least expected back goes first (``schedule.retention``), and tenants that hold more
than their part go before others. A session gives up the end of its prompt first. Chunks that no
session claims go before all others; chunks of turns that still run go last.

If the tier is much too small, offloading everything is worse than offloading nothing: every stored
chunk pushes out one that would have been needed. So sessions are taken in freely only while all
sessions that are expected back fit (``WorkingSet``). Otherwise a session is taken in only if it is
expected back at least as soon as the one whose place it would take.

Source: vLLM's ``CachePolicy`` (v1/kv_offload/cpu/policies/base.py); admission against the victim
as in TinyLFU (Einziger et al., ACM ToS 2017).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, NamedTuple, TypeVar

from vllm_stateful.schedule.fairness import FairQueue
from vllm_stateful.schedule.gaps import LOST_S, Forecast, GapModel, Wait, WaitKind
from vllm_stateful.schedule.retention import Worth

K = TypeVar("K", bound=Hashable)

MAX_SESSIONS = 10_000
"""The most waits that are remembered; the one that began longest ago is forgotten."""

MAX_BRANCHES = 4
"""Turns after which a session loses a chunk that none of them used. Several turns are needed
because parallel sub-agents share one session id."""

WISHED_SHARE = 0.5
"""Share of the tier up to which the wishes of clients count."""


class Owner(NamedTuple):
    """The session and the tenant that chunks belong to."""

    session: Hashable
    tenant: Hashable = None
    salt: Hashable = None
    """Its cache salt, by which sessions share within the tenant (``schedule.fairness``)."""


class _Waiting(NamedTuple):
    forecast: Forecast
    since_s: float
    wished_until_s: float


class _Claim(Generic[K]):
    """The chunks that one session may need again.

    Attributes:
        keys: each chunk's key, with the number of the turn that used it last. The last key is
            given up first.
        num_turns: the number of turns of the session so far.
    """

    def __init__(self) -> None:
        self.keys: dict[K, int] = {}
        self.num_turns = 0

    def use(self, used: Iterable[K]) -> list[K]:
        """Count one more turn. Returns the chunks that none of the last ``MAX_BRANCHES`` used."""
        self.num_turns += 1
        before, self.keys = self.keys, dict.fromkeys(used, self.num_turns)
        oldest = self.num_turns - MAX_BRANCHES
        unused = []
        for key, turn in before.items():
            if key not in self.keys:
                if turn > oldest:
                    self.keys[key] = turn
                else:
                    unused.append(key)
        return unused


class WorkingSet:
    """The tokens of waiting sessions, weighed by each session's chance to come back.

    Args:
        capacity_tokens: tokens that the tier can hold.
    """

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity = max(1, capacity_tokens)
        self._waiting: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()
        self._num_tokens = 0.0

    def waits(self, session: Hashable, num_tokens: int, returns: float, now_s: float) -> None:
        """Record that a turn ended. ``returns`` is the chance that the session comes back."""
        self.ended(session)
        self._waiting[session] = (num_tokens * returns, now_s)
        self._num_tokens += num_tokens * returns
        while self._waiting:
            oldest, (_, since_s) = next(iter(self._waiting.items()))
            if since_s + LOST_S > now_s and len(self._waiting) <= MAX_SESSIONS:
                return
            self.ended(oldest)

    def ended(self, session: Hashable) -> None:
        """Remove a session that does not wait any more; a no-op when it is not known."""
        self._num_tokens -= self._waiting.pop(session, (0.0, 0.0))[0]

    @property
    def ratio(self) -> float:
        """The weighed tokens of all sessions, as a multiple of the tier's capacity."""
        return max(0.0, self._num_tokens) / self._capacity


class OffloadOrder(Generic[K]):
    """The chunks of one tier and the sessions that claim them. Not thread-safe.

    Args:
        capacity: the number of chunks that the tier can hold.
        clock: the monotonic time in seconds.
    """

    def __init__(self, capacity: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._claims: dict[Owner, _Claim[K]] = {}
        self._num_claims: dict[K, int] = {}
        """For each chunk in the tier, the number of sessions that claim it."""
        self._running: OrderedDict[K, None] = OrderedDict()
        """Chunks stored by turns that have not ended, in the order in which they were stored."""
        self._orphans: OrderedDict[K, None] = OrderedDict()
        """Chunks that no session claims any more."""
        self._waiting: OrderedDict[Owner, _Waiting] = OrderedDict()
        self._queue: FairQueue[Owner] = FairQueue(capacity * WISHED_SHARE)
        self._unknown = GapModel().forecast(None, Wait(WaitKind.ONE_SHOT))

    def __len__(self) -> int:
        return len(self._num_claims)

    # ---- what is here --------------------------------------------------------------------

    def stored(self, key: K) -> None:
        """Add a chunk that a running turn stored."""
        self._num_claims[key] = 0
        self._running[key] = None

    def removed(self, key: K) -> None:
        """Remove a chunk that could not be stored. O(all sessions), and rare."""
        for owner in [owner for owner, claim in self._claims.items() if key in claim.keys]:
            del self._claims[owner].keys[key]
            self._settle(owner)
        self._take_out(key)

    def clear(self) -> None:
        """Remove all chunks. What is known about the waits of sessions is kept."""
        for owner in self._claims:
            self._queue.discard(owner)
        self._claims.clear()
        self._num_claims.clear()
        self._running.clear()
        self._orphans.clear()

    # ---- whose it is ---------------------------------------------------------------------

    def used(self, owner: Owner, keys: Iterable[K]) -> None:
        """Claim for a session the chunks of a turn that ended, in the order of its prompt.

        Chunks of earlier turns that this turn did not use go before these. The session gives them
        up after ``MAX_BRANCHES`` turns.
        """
        claim = self._claims.setdefault(owner, _Claim())
        here = [key for key in keys if key in self._num_claims]
        for key in here:
            if key not in claim.keys:
                self._num_claims[key] += 1
                self._running.pop(key, None)
                self._orphans.pop(key, None)
        for key in claim.use(here):
            self._give_up(key)
        self._settle(owner)

    def waits(self, owner: Owner, forecast: Forecast, wished_until_s: float = 0.0) -> None:
        """Record that a session began to wait for its next turn.

        Args:
            owner: the session.
            forecast: when it is expected back.
            wished_until_s: the time until which its client asked to keep it; 0 without a wish.
        """
        self._waiting[owner] = _Waiting(forecast, self._clock(), wished_until_s)
        self._waiting.move_to_end(owner)
        if len(self._waiting) > MAX_SESSIONS:
            self._waiting.popitem(last=False)
        self._settle(owner)

    def ended(self, owner: Owner) -> None:
        """Drop all claims of a session that is over."""
        self._waiting.pop(owner, None)
        claim = self._claims.pop(owner, None)
        for key in claim.keys if claim is not None else ():
            self._give_up(key)
        self._queue.discard(owner)

    # ---- what goes, and what comes in ------------------------------------------------------

    def take(self, num: int, is_free: Callable[[K], bool]) -> list[K]:
        """Take out ``num`` chunks, the least valuable first.

        Args:
            num: the number of chunks; at least this many must be free.
            is_free: tells whether a chunk may go now (no transfer reads or writes it).
        """
        taken = self._take_from(self._orphans, num, is_free)
        passed_over = []
        while len(taken) < num:
            victim = self._queue.next_victim(self._clock())
            if victim is None:
                break
            taken += self._take_tail(victim, num - len(taken), is_free)
            if len(taken) < num:  # none of its remaining chunks can go now
                self._queue.discard(victim)
                passed_over.append(victim)
        for owner in passed_over:
            self._settle(owner)
        taken += self._take_from(self._running, num - len(taken), is_free)
        assert len(taken) == num
        return taken

    def beats_victim(self, owner: Owner, otherwise: Forecast | None = None) -> bool:
        """Whether a session is expected back at least as soon as the one that it would push out.

        Args:
            owner: the session.
            otherwise: the forecast to use if the session is not known. Without one, an unknown
                session is let in.
        """
        now_s = self._clock()
        known = self._waiting.get(owner)
        forecast = otherwise if known is None else known.forecast
        victim = None if self._orphans else self._queue.next_victim(now_s, keep=owner)
        if victim is None or forecast is None:
            return True
        wishes = known is not None and known.wished_until_s > now_s
        ours = (Worth.WISHED if wishes else Worth.LIVE, forecast.rate(0.0))
        return ours >= self._queue.rank(victim, now_s)[:2]

    # ---- bookkeeping ---------------------------------------------------------------------

    def _settle(self, owner: Owner) -> None:
        """Put a session into the queue if it claims chunks in the tier; else take it out."""
        claim = self._claims.get(owner)
        if claim is None or not claim.keys:
            self._claims.pop(owner, None)
            self._queue.discard(owner)
            return
        known = self._waiting.get(owner) or _Waiting(self._unknown, self._clock(), 0.0)
        self._queue.add(
            owner,
            tenant=owner.tenant,
            salt=owner.salt,
            num_blocks=len(claim.keys),
            worth=Worth.LIVE,
            forecast=known.forecast,
            now_s=known.since_s,
            wished_until_s=known.wished_until_s,
        )

    def _take_tail(self, owner: Owner, num: int, is_free: Callable[[K], bool]) -> list[K]:
        """Take up to ``num`` free chunks that only this session claims, from its end.

        On the way it loses its claim to chunks that other sessions claim as well.
        """
        keys = self._claims[owner].keys
        taken: list[K] = []
        stay: list[tuple[K, int]] = []
        while keys and len(taken) < num:
            key, turn = keys.popitem()
            if self._num_claims[key] > 1:
                self._num_claims[key] -= 1
            elif is_free(key):
                self._take_out(key)
                taken.append(key)
            else:
                stay.append((key, turn))
        keys.update(reversed(stay))
        if keys:
            self._queue.shrink(owner, len(keys))
        else:
            self._settle(owner)
        return taken

    def _take_from(
        self, keys: OrderedDict[K, None], num: int, is_free: Callable[[K], bool]
    ) -> list[K]:
        taken: list[K] = []
        if num:
            for key in keys:
                if is_free(key):
                    taken.append(key)
                    if len(taken) == num:
                        break
        for key in taken:
            self._take_out(key)
        return taken

    def _give_up(self, key: K) -> None:
        self._num_claims[key] -= 1
        if not self._num_claims[key]:
            self._orphans[key] = None

    def _take_out(self, key: K) -> None:
        self._num_claims.pop(key, None)
        self._running.pop(key, None)
        self._orphans.pop(key, None)
