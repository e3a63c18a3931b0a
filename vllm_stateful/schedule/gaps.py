# SPDX-License-Identifier: Apache-2.0
"""How long a session waits for its next turn: learned per tenant, kind of wait and tool name.

A gap is the time from the end of a turn to the arrival of the next. Gaps are nearly log-normal with
heavy tails, and some sessions never come back. So a histogram is learned over log-spaced times,
with one more bin for "never". The histogram of a tool starts with the shares of its kind of wait;
the histogram of a kind starts with a log-normal prior. A session's own gaps are mixed in.
``Forecast`` turns a histogram into what a waiting session is worth at each age.

Each tenant has a book of its own, of bounded size, so the tool names of one tenant cannot push out
those of another. When at least ``MIN_TENANTS`` tenants have learned a kind of wait, or a tool of
the same name, a tenant that has seen none starts with the mean of their histograms. What fewer
tenants have seen is never shared.

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
"""Bins of a histogram. The first ends at ``SHORTEST_S``, the last at ``LONGEST_S``; in between,
each bin ends at 1.4 times the end of the one before."""

SHORTEST_S = 0.5
LONGEST_S = 86400.0
EDGES_S: Floats = np.concatenate([[0.0], np.geomspace(SHORTEST_S, LONGEST_S, NUM_BINS)])
"""Seconds, shape ``[NUM_BINS + 1]``: the beginning of each bin, and the end of the last one."""

_EDGES_S: list[float] = EDGES_S.tolist()

LOST_S = 7200.0
"""Seconds of silence after which a session counts as lost, until it comes back."""

PARENT_WEIGHT = 10.0
"""The number of gaps that a new histogram's starting shares count as."""

CLASS_WEIGHT = 4.0
"""The number of gaps that the histogram of all sessions counts as beside a session's own gaps."""

MOST_GAPS = 2000.0
"""The most gaps that a histogram counts. Older gaps then count less, so it follows changes."""

EXPECTED_WEIGHT = 4.0
"""The number of gaps that a time counts as which the client expects."""

OWN_DECAY = 0.9
"""The weight of a gap of a session, relative to the gap after it."""

MAX_TOOLS = 256
"""Histograms of tools per tenant; the one that was used longest ago is forgotten."""

MAX_HISTOGRAMS = 16384
"""Histograms of all tenants, some 10 MB. The tenant seen longest ago is forgotten."""

MIN_TENANTS = 3
"""Tenants that must have learned a histogram before other tenants start with their mean."""

MIN_GAPS = 4
"""Gaps that a tenant must have seen to count as having learned a histogram."""

MAX_SHARING = 16
"""Tenants whose mean is taken: those that learned the histogram last."""


class WaitKind(StrEnum):
    """What a session does between two turns."""

    TOOL = "tool"
    """Its last answer called a tool."""
    USER = "user"
    """Its last answer called none."""
    ONE_SHOT = "one_shot"
    """No client named the session, and no second turn has continued it so far."""


class Wait(NamedTuple):
    """The wait that begins when a turn ends."""

    kind: WaitKind
    tool: str = ""
    """Name of the tool that was called first; empty if it is not known."""
    num_turns: int = 1
    """Turns of the session so far. A session that came back often will come back again."""


class _Prior(NamedTuple):
    median_s: float
    log_sd: float
    returns: float
    """The share of sessions that come back at all."""


PRIORS = {
    WaitKind.TOOL: _Prior(7.4, 1.6, 0.97),
    WaitKind.USER: _Prior(148.0, 2.0, 0.75),
    WaitKind.ONE_SHOT: _Prior(148.0, 2.0, 0.2),
}
"""From recorded sessions of coding agents (benchmarks/policy)."""


def bin_of(seconds: float) -> int:
    """The index of the bin that holds a time. Times longer than a day fall into the last bin."""
    return min(NUM_BINS, bisect_right(_EDGES_S, seconds)) - 1


def _log_normal(prior: _Prior) -> Floats:
    """Shape ``[NUM_BINS + 1]``: the share of gaps in each bin, and the share of "never"."""
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
        """Add a gap, spread over its bin (half) and the two bins beside it (a quarter each)."""
        counts = self._counts.setdefault(kind, np.zeros(NUM_BINS))
        counts *= OWN_DECAY
        counts += _spread(gap_s)

    def mixed_into(self, kind: WaitKind, shares: Floats) -> Floats:
        """Mix this session's gaps into the shares of all sessions; the share of "never" stays.

        Args:
            kind: the kind of wait whose gaps are mixed in.
            shares: shape ``[NUM_BINS + 1]``, sum 1.
        """
        counts = self._counts.get(kind)
        return shares if counts is None else _mixed(shares, counts)


def _spread(gap_s: float) -> Floats:
    """Shape ``[NUM_BINS]``, sum 1: a gap in its bin (half) and the two beside it (a quarter)."""
    counts, place = np.zeros(NUM_BINS), bin_of(gap_s)
    for step, share in ((-1, 0.25), (0, 0.5), (1, 0.25)):
        counts[min(NUM_BINS - 1, max(0, place + step))] += share
    return counts


def _mixed(shares: Floats, counts: Floats) -> Floats:
    """Shares with gaps mixed in, which are counted by bin; the share of "never" stays."""
    returns = 1 - shares[-1]
    mixed = (CLASS_WEIGHT * shares[:-1] / returns + counts) / (CLASS_WEIGHT + counts.sum())
    return np.append(mixed * returns, shares[-1])


class Forecast:
    """What keeping the KV of a waiting session is worth at each age, in returns per second.

    The rate at age ``a`` is the maximum over all horizons ``h`` of a quotient: the chance that the
    session returns within ``h``, divided by the expected time for which the KV is kept until that
    return or until ``h``.

    Args:
        shares: shape ``[NUM_BINS + 1]``, sum 1: the chance of each gap, and of no return.
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
        """The chance that the session returns at all."""

    def rate(self, age_s: float) -> float:
        """The returns per second of a session that has waited for ``age_s`` seconds."""
        return self._rates[bin_of(age_s)] if age_s < LONGEST_S else 0.0


class _Histogram:
    """The gaps that one tenant saw for one kind of wait, or for one tool."""

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
        """Add a gap to a bin. The last bin is "never"; ``was_lost`` takes one gap out of it."""
        self.num_gaps += 1
        self.counts[place] += 1
        if was_lost:
            self.counts[-1] = max(0.01, self.counts[-1] - 1)
        total = self.counts.sum()
        if total > MOST_GAPS:
            self.counts *= MOST_GAPS / total


_Key = tuple[WaitKind] | tuple[WaitKind, str, int]
"""A kind of wait; or a kind, a tool's name and the session's stage (log2 of its turns, up to 4)."""


class _Book:
    """The histograms of one tenant. The few histograms of kinds stay as long as the tenant does."""

    __slots__ = ("kinds", "tools")

    def __init__(self) -> None:
        self.kinds: dict[_Key, _Histogram] = {}
        self.tools: OrderedDict[_Key, _Histogram] = OrderedDict()

    def __len__(self) -> int:
        return len(self.kinds) + len(self.tools)


class GapModel:
    """All histograms of one engine core. Not thread-safe.

    Args:
        max_histograms: histograms of all tenants together. The tenant that learns keeps its own.
        max_tools: histograms of tools that one tenant may have.
    """

    def __init__(self, max_histograms: int = MAX_HISTOGRAMS, max_tools: int = MAX_TOOLS) -> None:
        self._max = max_histograms
        self._max_tools = max(1, min(max_tools, max_histograms - len(WaitKind)))
        self._num = 0
        self._books: OrderedDict[Hashable, _Book] = OrderedDict()
        """The book of each tenant. The tenant that was seen longest ago comes first."""
        self._learned: dict[_Key, dict[Hashable, _Histogram]] = {}
        """For each key the tenants that have learned it, in the order in which they did."""
        self._priors = {kind: _log_normal(prior) for kind, prior in PRIORS.items()}

    def __len__(self) -> int:
        return self._num

    def learn(self, tenant: Hashable, wait: Wait, gap_s: float, *, was_lost: bool = False) -> None:
        """Learn from a session that came back.

        Args:
            tenant: the tenant whose histograms learn.
            wait: the wait that is over.
            gap_s: the seconds that it lasted.
            was_lost: whether ``learn_lost`` has counted this wait as lost.
        """
        self._add(tenant, wait, bin_of(gap_s), was_lost=was_lost)

    def learn_lost(self, tenant: Hashable, wait: Wait) -> None:
        """Learn from a session that was closed, or was silent for ``LOST_S``."""
        self._add(tenant, wait, NUM_BINS)

    def forecast(
        self,
        tenant: Hashable,
        wait: Wait,
        own: OwnGaps | None = None,
        expected_s: float | None = None,
    ) -> Forecast:
        """The forecast for a session that begins to wait.

        Args:
            tenant: the tenant whose histograms are used.
            wait: what the session waits for.
            own: the session's own gaps so far.
            expected_s: the seconds that the client expects it to wait. Counts as `EXPECTED_WEIGHT`
                gaps of the session, and only for this wait.
        """
        kind, tool = _keys(wait)
        book = self._books.get(tenant)
        if book is None:
            shares = self._start_of_tool(tool, self._start_of_kind(kind))
        else:
            self._books.move_to_end(tenant)
            shares = self._shares(book, kind, tool)
        if own is not None:
            shares = own.mixed_into(wait.kind, shares)
        if expected_s is not None:
            shares = _mixed(shares, EXPECTED_WEIGHT * _spread(expected_s))
        return Forecast(shares)

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
        """Forget tools of this tenant, and other tenants, until both limits are met."""
        while len(book.tools) > self._max_tools:
            self._forget(tenant, book.tools.popitem(last=False)[0])
        while self._num > self._max and len(self._books) > 1:
            oldest, gone = self._books.popitem(last=False)
            for key in (*gone.kinds, *gone.tools):
                self._forget(oldest, key)

    def _forget(self, tenant: Hashable, key: _Key) -> None:
        """Stop counting and sharing a histogram that was taken out of its book."""
        self._num -= 1
        tenants = self._learned.get(key, {})
        if tenants.pop(tenant, None) is not None and not tenants:
            del self._learned[key]

    def _start_of_kind(self, kind: _Key) -> Floats:
        """The shares with which a tenant starts that has not seen this kind of wait."""
        shared = self._shared(kind)
        prior = self._priors[kind[0]]
        return prior / prior.sum() if shared is None else shared

    def _start_of_tool(self, tool: _Key, parent: Floats) -> Floats:
        """The shares with which a tenant starts that has not seen this tool."""
        shared = self._shared(tool)
        return parent if shared is None else shared

    def _shared(self, key: _Key) -> Floats | None:
        """The mean over the tenants that have learned a key; None when too few have."""
        tenants = self._learned.get(key, {})
        if len(tenants) < MIN_TENANTS:
            return None
        last = [each.shares for each in itertools.islice(reversed(tenants.values()), MAX_SHARING)]
        mean: Floats = np.mean(last, axis=0)
        return mean


def _keys(wait: Wait) -> tuple[_Key, _Key]:
    """The keys of a wait's two histograms: that of its kind, and that of its tool."""
    stage = min(4, wait.num_turns.bit_length() - 1)
    return (wait.kind,), (wait.kind, wait.tool, stage)
