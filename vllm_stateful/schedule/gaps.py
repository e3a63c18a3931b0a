# SPDX-License-Identifier: Apache-2.0
"""How long a session waits for its next turn: learned per tenant, kind of wait and tool name.

A gap is the time from the end of a turn to the arrival of the next. Gaps are near log-normal with
heavy tails, and some sessions never come back, so what is learned is a histogram over log-spaced
times with one more bin for "never". It starts as a log-normal prior; the histogram of a tool starts
as that of its kind, and a session's own gaps are mixed in. ``Forecast`` turns one into what a
waiting session is worth at each age.

Source: Continuum (arXiv:2511.02230) for gaps per tool; least hit density (Beckmann et al., NSDI'18)
and Gittins' index for the worth.
"""

from __future__ import annotations

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

MAX_HISTOGRAMS = 1024
"""Of all tenants together; the one that was used longest ago is forgotten."""


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


class GapModel:
    """All histograms of one engine core. Not thread-safe."""

    def __init__(self, max_histograms: int = MAX_HISTOGRAMS) -> None:
        self._max = max_histograms
        self._counts: OrderedDict[Hashable, Floats] = OrderedDict()
        self._priors = {kind: _log_normal(prior) for kind, prior in PRIORS.items()}

    def __len__(self) -> int:
        return len(self._counts)

    def learn(self, tenant: Hashable, wait: Wait, gap_s: float, *, was_lost: bool = False) -> None:
        """A session came back.

        Args:
            tenant: whose histograms to use.
            wait: what the turn before ended in.
            gap_s: seconds until this one.
            was_lost: ``learn_lost`` was told so.
        """
        for counts in self._path(tenant, wait):
            counts[bin_of(gap_s)] += 1
            if was_lost:
                counts[-1] = max(0.01, counts[-1] - 1)
            self._bound(counts)

    def learn_lost(self, tenant: Hashable, wait: Wait) -> None:
        """A session was closed, or was silent for ``LOST_S``."""
        for counts in self._path(tenant, wait):
            counts[-1] += 1
            self._bound(counts)

    def forecast(self, tenant: Hashable, wait: Wait, own: OwnGaps | None = None) -> Forecast:
        """What to expect of a session that begins to wait.

        Args:
            tenant: whose histograms to use.
            wait: what it waits for.
            own: its gaps so far.
        """
        counts = self._path(tenant, wait)[-1]
        shares = counts / counts.sum()
        return Forecast(shares if own is None else own.mixed_into(wait.kind, shares))

    def _path(self, tenant: Hashable, wait: Wait) -> list[Floats]:
        """The histograms that a wait belongs to, from the most general on."""
        parent = self._priors[wait.kind]
        found = []
        stage = min(4, wait.num_turns.bit_length() - 1)
        for key in ((tenant, wait.kind), (tenant, wait.kind, wait.tool, stage)):
            counts = self._counts.get(key)
            if counts is None:
                counts = self._counts[key] = parent / parent.sum() * PARENT_WEIGHT
            self._counts.move_to_end(key)
            found.append(counts)
            parent = counts
        while len(self._counts) > self._max:
            self._counts.popitem(last=False)
        return found

    @staticmethod
    def _bound(counts: Floats) -> None:
        total = counts.sum()
        if total > MOST_GAPS:
            counts *= MOST_GAPS / total
