# SPDX-License-Identifier: Apache-2.0
"""Which chunks an offload tier gives up first, and which sessions it takes in at all.

A chunk belongs to every session whose last prompt had it; it goes when the last of them gives it
up. The session goes first whose return is expected least (``schedule.retention``, the order of the
GPU's own residencies, tenants that hold more than their part first), from its end inwards. Chunks
that nobody has any claim to go before all others; those of turns that still run go last.

Offloading everything is worse than nothing where the tier is much too small: every chunk pushes
out one that would have been needed. So a session is taken in freely only while all that are
expected back fit (``working_set``), and else only if it is expected back sooner than the one
whose place it would take.

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
"""Waits remembered; the one that began longest ago is forgotten."""

MAX_BRANCHES = 4
"""Turns after which a session loses what they did not use: parallel sub-agents share an id."""

WISHED_SHARE = 0.5
"""Wishes of clients count up to this share of the tier."""


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
        keys: in the order in which they are to stay; to each the turn that used it last.
        num_turns: turns of the session so far.
    """

    def __init__(self) -> None:
        self.keys: dict[K, int] = {}
        self.num_turns = 0

    def use(self, used: Iterable[K]) -> list[K]:
        """One more turn. Returns what no turn of the last ``MAX_BRANCHES`` has used."""
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
    """Tokens of the sessions that wait and are expected back, each weighed by that chance.

    Args:
        capacity_tokens: what the tier can hold.
    """

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity = max(1, capacity_tokens)
        self._waiting: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()
        self._num_tokens = 0.0

    def waits(self, session: Hashable, num_tokens: int, returns: float, now_s: float) -> None:
        """A session's turn ended with so many tokens; ``returns`` is the chance of another."""
        self.ended(session)
        self._waiting[session] = (num_tokens * returns, now_s)
        self._num_tokens += num_tokens * returns
        while self._waiting:
            oldest, (_, since_s) = next(iter(self._waiting.items()))
            if since_s + LOST_S > now_s and len(self._waiting) <= MAX_SESSIONS:
                return
            self.ended(oldest)

    def ended(self, session: Hashable) -> None:
        """The session will not come back; a no-op when it is not known."""
        self._num_tokens -= self._waiting.pop(session, (0.0, 0.0))[0]

    @property
    def ratio(self) -> float:
        """All of it, as a multiple of the tier's capacity."""
        return max(0.0, self._num_tokens) / self._capacity


class OffloadOrder(Generic[K]):
    """The books of one tier. Not thread-safe. Times are those of ``clock``.

    Args:
        capacity: chunks that the tier holds.
        clock: seconds, monotonic.
    """

    def __init__(self, capacity: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._claims: dict[Owner, _Claim[K]] = {}
        self._num_claims: dict[K, int] = {}
        """How many sessions have a claim to a chunk that is here."""
        self._running: OrderedDict[K, None] = OrderedDict()
        """Stored by turns that have not ended, in that order."""
        self._orphans: OrderedDict[K, None] = OrderedDict()
        self._waiting: OrderedDict[Owner, _Waiting] = OrderedDict()
        self._queue: FairQueue[Owner] = FairQueue(capacity * WISHED_SHARE)
        self._unknown = GapModel().forecast(None, Wait(WaitKind.ONE_SHOT))

    def __len__(self) -> int:
        return len(self._num_claims)

    # ---- what is here --------------------------------------------------------------------

    def stored(self, key: K) -> None:
        """A chunk of a running turn came in."""
        self._num_claims[key] = 0
        self._running[key] = None

    def removed(self, key: K) -> None:
        """A chunk is not here after all (its store failed). O(all chunks), and rare."""
        for owner in [owner for owner, claim in self._claims.items() if key in claim.keys]:
            del self._claims[owner].keys[key]
            self._settle(owner)
        self._take_out(key)

    def clear(self) -> None:
        """Everything is gone; what is known of the sessions is kept."""
        for owner in self._claims:
            self._queue.discard(owner)
        self._claims.clear()
        self._num_claims.clear()
        self._running.clear()
        self._orphans.clear()

    # ---- whose it is ---------------------------------------------------------------------

    def used(self, owner: Owner, keys: Iterable[K]) -> None:
        """A turn of the session ended; these chunks are its prompt's, from its head on.

        Those of earlier turns that it did not use go before these, and are given up some turns
        later.
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
        """A session began to wait for its next turn.

        Args:
            owner: the session.
            forecast: when it is expected back.
            wished_until_s: until then its client asked to keep it; 0 without a wish.
        """
        self._waiting[owner] = _Waiting(forecast, self._clock(), wished_until_s)
        self._waiting.move_to_end(owner)
        if len(self._waiting) > MAX_SESSIONS:
            self._waiting.popitem(last=False)
        self._settle(owner)

    def ended(self, owner: Owner) -> None:
        """The session is over: nobody needs what only it had."""
        self._waiting.pop(owner, None)
        claim = self._claims.pop(owner, None)
        for key in claim.keys if claim is not None else ():
            self._give_up(key)
        self._queue.discard(owner)

    # ---- what goes, and what comes in ------------------------------------------------------

    def take(self, num: int, is_free: Callable[[K], bool]) -> list[K]:
        """Take out so many chunks, the least valuable first.

        Args:
            num: how many; there must be as many that are free.
            is_free: whether a chunk may go now (no transfer reads or writes it).
        """
        taken = self._take_from(self._orphans, num, is_free)
        passed_over = []
        while len(taken) < num:
            victim = self._queue.next_victim(self._clock())
            if victim is None:
                break
            taken += self._take_tail(victim, num - len(taken), is_free)
            if len(taken) < num:  # what is left of it cannot go now
                self._queue.discard(victim)
                passed_over.append(victim)
        for owner in passed_over:
            self._settle(owner)
        taken += self._take_from(self._running, num - len(taken), is_free)
        assert len(taken) == num
        return taken

    def beats_victim(self, owner: Owner, otherwise: Forecast | None = None) -> bool:
        """Whether a session is expected back at least as soon as the one that would go for it.

        Args:
            owner: the session.
            otherwise: what to expect where the session is not known; without it, it is given the
                chance to be.
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
        """In the queue while it has chunks here, with their number, and only then."""
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
        """Chunks that only this session claims, from its end on; it loses its claim to others."""
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
