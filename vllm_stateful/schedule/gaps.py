# SPDX-License-Identifier: Apache-2.0
"""How long a session waits for its next turn: learned per tenant, kind of wait and tool name.

A gap is the time from the end of a turn to the arrival of the next. Gaps are near log-normal with
heavy tails, and some sessions never come back, so what is learned is a histogram over log-spaced
times with one more bin for "never". The histogram of a tool starts as that of its kind, that of a
kind as a log-normal prior, and a session's own gaps are mixed in. ``Forecast`` turns one into what
a waiting session is worth at each age.

Each tenant has a book of its own, of bounded size: the names that one tenant's tools have push
nobody else's out. Where ``MIN_TENANTS`` others have learned a kind, or a tool of the same name, a
tenant that has not starts as the mean of theirs. So what fewer have seen is never told to anybody.

Source: Continuum (arXiv:2511.02230) for gaps per tool; least hit density (Beckmann et al., NSDI'18)
and Gittins' index for the worth.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Hashable
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NUM_BINS = 36
"""Times that are told apart, from ``SHORTEST_S`` to ``LONGEST_S``; a factor of 1.4 each."""

SHORTEST_S = 0.5
LONGEST_S = 86400.0
EDGES_S: Floats = np.concatenate([[0.0], np.geomspace(SHORTEST_S, LONGEST_S, NUM_BINS)])
"""Shape ``[NUM_BINS + 1]``: where the bins begin, and where the last one ends."""

_EDGES_S: list[float] = EDGES_S.tolist()

LOST_S = 7200.0
"""A session that is silent for so long is counted as lost, until it comes back."""

PARENT_WEIGHT = 10.0
"""Gaps that the prior, or the histogram of the kind, counts as."""

CLASS_WEIGHT = 4.0
"""Gaps that the histogram of all sessions counts as beside a session's own."""

MOST_GAPS = 2000.0
"""Older gaps count less and less: what was learned follows a change."""

OWN_DECAY = 0.9
"""How much less each earlier gap of a session counts than the one after it."""

MAX_TOOLS = 256
"""Histograms of tools that one tenant has; the one that was used longest ago is forgotten."""

MAX_HISTOGRAMS = 16384
"""Histograms of all tenants, some 10 MB. The tenant seen longest ago is forgotten."""

MIN_TENANTS = 3
"""Tenants that must have learned a gap before it is what others start with."""

MIN_GAPS = 4
"""Gaps after which a tenant counts as one that has learned."""

MAX_SHARING = 16
"""Tenants whose mean is taken, those that learned last."""


class WaitKind(StrEnum):
    """What a session does between two turns."""

    TOOL = "tool"
    """Its last answer called a tool."""
    USER = "user"
    """Its last answer called none."""
    ONE_SHOT = "one_shot"
    """No client named it, and nobody has continued it so far."""


class Wait(NamedTuple):
    """The wait that a turn ended in."""

    kind: WaitKind
    tool: str = ""
    """Name of the tool that was called first, where it is known."""
    num_turns: int = 1
    """Turns of the session so far: one that came back often will again."""


class _Prior(NamedTuple):
    median_s: float
    log_sd: float
    returns: float
    """Share that comes back at all."""


PRIORS = {
    WaitKind.TOOL: _Prior(7.4, 1.6, 0.97),
    WaitKind.USER: _Prior(148.0, 2.0, 0.75),
    WaitKind.ONE_SHOT: _Prior(148.0, 2.0, 0.2),
}
"""From recorded sessions of coding agents (benchmarks/policy)."""


def bin_of(seconds: float) -> int:
    """The bin that a time lies in; all that is longer than a day lies in the last."""
    return min(NUM_BINS, bisect_right(_EDGES_S, seconds)) - 1


def _log_normal(prior: _Prior) -> Floats:
    """Shape ``[NUM_BINS + 1]``: the share in each bin, and of those that never come."""
    scale = prior.log_sd * math.sqrt(2)
    below = [0.0]
    below += [0.5 * (1 + math.erf(math.log(edge / prior.median_s) / scale)) for edge in EDGES_S[1:]]
    shares = np.diff(below)
    shares *= prior.returns / shares.sum()
    return np.append(shares, 1 - prior.returns)


class OwnGaps:
    """The gaps of one session, by the kind of wait."""

    def __init__(self) -> None:
        self._counts: dict[WaitKind, Floats] = {}

    def add(self, kind: WaitKind, gap_s: float) -> None:
        """One more, spread over its bin and both beside it."""
        counts = self._counts.setdefault(kind, np.zeros(NUM_BINS))
        counts *= OWN_DECAY
        place = bin_of(gap_s)
        for step, share in ((-1, 0.25), (0, 0.5), (1, 0.25)):
            counts[min(NUM_BINS - 1, max(0, place + step))] += share

    def mixed_into(self, kind: WaitKind, shares: Floats) -> Floats:
        """All sessions' histogram and this session's; the share that never comes is kept."""
        counts = self._counts.get(kind)
        if counts is None:
            return shares
        returns = 1 - shares[-1]
        mixed = (CLASS_WEIGHT * shares[:-1] / returns + counts) / (CLASS_WEIGHT + counts.sum())
        return np.append(mixed * returns, shares[-1])


class Forecast:
    """What a wait is worth at each age: returns per second, were its KV kept.

    The rate at age ``a`` is the best, over all horizons ``h``, of the chance of a return within
    ``h`` divided by the expected time for which the KV is kept until that return or ``h``.

    Args:
        shares: shape ``[NUM_BINS + 1]``, sum 1: the chance of each gap, and of none.
    """

    def __init__(self, shares: Floats) -> None:
        returned = np.concatenate([[0.0], np.cumsum(shares[:-1])])
        waiting = 1 - returned
        spans = np.diff(EDGES_S) * (waiting[1:] + waiting[:-1]) / 2
        kept = np.concatenate([[0.0], np.cumsum(spans)])
        hits = returned[None, 1:] - returned[:-1, None]
        costs = kept[None, 1:] - kept[:-1, None]
        rates = np.divide(hits, costs, out=np.zeros_like(hits), where=costs > 0)
        self._rates: list[float] = rates.max(axis=1).tolist()
        self.returns = float(returned[-1])
        """The chance that it returns at all."""

    def rate(self, age_s: float) -> float:
        """Returns per second of a session that has waited for ``age_s``."""
        return self._rates[bin_of(age_s)] if age_s < LONGEST_S else 0.0


class _Histogram:
    """What one tenant saw of one kind of wait, or of one tool."""

    __slots__ = ("counts", "num_gaps")

    def __init__(self, shares: Floats) -> None:
        self.counts = shares * PARENT_WEIGHT
        self.num_gaps = 0

    @property
    def shares(self) -> Floats:
        """Shape ``[NUM_BINS + 1]``, sum 1."""
        shares: Floats = self.counts / self.counts.sum()
        return shares

    def add(self, place: int, *, was_lost: bool = False) -> None:
        """One more gap in a bin; the last bin is "never", and ``was_lost`` takes one out of it."""
        self.num_gaps += 1
        self.counts[place] += 1
        if was_lost:
            self.counts[-1] = max(0.01, self.counts[-1] - 1)
        total = self.counts.sum()
        if total > MOST_GAPS:
            self.counts *= MOST_GAPS / total


_Key = tuple[WaitKind] | tuple[WaitKind, str, int]
"""A kind of wait; or a kind, the name of a tool, and how often the session came back so far."""


class _Book:
    """The histograms of one tenant. Those of kinds are few and stay as long as it does."""

    __slots__ = ("kinds", "tools")

    def __init__(self) -> None:
        self.kinds: dict[_Key, _Histogram] = {}
        self.tools: OrderedDict[_Key, _Histogram] = OrderedDict()

    def __len__(self) -> int:
        return len(self.kinds) + len(self.tools)


class GapModel:
    """All histograms of one engine core. Not thread-safe.

    Args:
        max_histograms: of all tenants together, but always those of the one that learns.
        max_tools: histograms of tools that one tenant may have.
    """

    def __init__(self, max_histograms: int = MAX_HISTOGRAMS, max_tools: int = MAX_TOOLS) -> None:
        self._max = max_histograms
        self._max_tools = max(1, min(max_tools, max_histograms - len(WaitKind)))
        self._num = 0
        self._books: OrderedDict[Hashable, _Book] = OrderedDict()
        """The tenant that was seen longest ago first."""
        self._learned: dict[_Key, dict[Hashable, _Histogram]] = {}
        """The tenants that have learned each, as they did."""
        self._priors = {kind: _log_normal(prior) for kind, prior in PRIORS.items()}

    def __len__(self) -> int:
        return self._num

    def learn(self, tenant: Hashable, wait: Wait, gap_s: float, *, was_lost: bool = False) -> None:
        """A session came back.

        Args:
            tenant: whose histograms to use.
            wait: what the turn before ended in.
            gap_s: seconds until this one.
            was_lost: ``learn_lost`` was told so.
        """
        self._add(tenant, wait, bin_of(gap_s), was_lost=was_lost)

    def learn_lost(self, tenant: Hashable, wait: Wait) -> None:
        """A session was closed, or was silent for ``LOST_S``."""
        self._add(tenant, wait, NUM_BINS)

    def forecast(self, tenant: Hashable, wait: Wait, own: OwnGaps | None = None) -> Forecast:
        """What to expect of a session that begins to wait.

        Args:
            tenant: whose histograms to use.
            wait: what it waits for.
            own: its gaps so far.
        """
        kind, tool = _keys(wait)
        book = self._books.get(tenant)
        if book is None:
            shares = self._start_of_tool(tool, self._start_of_kind(kind))
        else:
            self._books.move_to_end(tenant)
            shares = self._shares(book, kind, tool)
        return Forecast(shares if own is None else own.mixed_into(wait.kind, shares))

    def _shares(self, book: _Book, kind: _Key, tool: _Key) -> Floats:
        found = book.tools.get(tool)
        if found is not None:
            book.tools.move_to_end(tool)
            return found.shares
        parent = book.kinds.get(kind)
        return self._start_of_tool(
            tool, self._start_of_kind(kind) if parent is None else parent.shares
        )

    def _add(self, tenant: Hashable, wait: Wait, place: int, *, was_lost: bool = False) -> None:
        kind, tool = _keys(wait)
        book = self._books.setdefault(tenant, _Book())
        self._books.move_to_end(tenant)
        of_kind = book.kinds.get(kind)
        if of_kind is None:
            of_kind = book.kinds[kind] = _Histogram(self._start_of_kind(kind))
            self._num += 1
        of_tool = book.tools.get(tool)
        if of_tool is None:
            of_tool = book.tools[tool] = _Histogram(self._start_of_tool(tool, of_kind.shares))
            self._num += 1
        book.tools.move_to_end(tool)
        for key, histogram in ((kind, of_kind), (tool, of_tool)):
            histogram.add(place, was_lost=was_lost)
            if histogram.num_gaps == MIN_GAPS:
                self._learned.setdefault(key, {})[tenant] = histogram
        self._bound(tenant, book)

    def _bound(self, tenant: Hashable, book: _Book) -> None:
        """Forget tools of this tenant, and other tenants, until both limits are kept."""
        while len(book.tools) > self._max_tools:
            self._forget(tenant, book.tools.popitem(last=False)[0])
        while self._num > self._max and len(self._books) > 1:
            oldest, gone = self._books.popitem(last=False)
            for key in (*gone.kinds, *gone.tools):
                self._forget(oldest, key)

    def _forget(self, tenant: Hashable, key: _Key) -> None:
        """A histogram went out of its book."""
        self._num -= 1
        tenants = self._learned.get(key, {})
        if tenants.pop(tenant, None) is not None and not tenants:
            del self._learned[key]

    def _start_of_kind(self, kind: _Key) -> Floats:
        """What a tenant that knows nothing of a kind expects of it."""
        shared = self._shared(kind)
        prior = self._priors[kind[0]]
        return prior / prior.sum() if shared is None else shared

    def _start_of_tool(self, tool: _Key, parent: Floats) -> Floats:
        """What a tenant that knows nothing of a tool expects of it."""
        shared = self._shared(tool)
        return parent if shared is None else shared

    def _shared(self, key: _Key) -> Floats | None:
        """The mean of those who have learned it; None where they are too few."""
        tenants = self._learned.get(key, {})
        if len(tenants) < MIN_TENANTS:
            return None
        last = [each.shares for each in itertools.islice(reversed(tenants.values()), MAX_SHARING)]
        mean: Floats = np.mean(last, axis=0)
        return mean


def _keys(wait: Wait) -> tuple[_Key, _Key]:
    """Where a wait belongs to: its kind, and below it the tool."""
    stage = min(4, wait.num_turns.bit_length() - 1)
    return (wait.kind,), (wait.kind, wait.tool, stage)
