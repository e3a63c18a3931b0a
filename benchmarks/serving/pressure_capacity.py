# SPDX-License-Identifier: Apache-2.0
"""How large a KV cache is that holds a share of what live sessions hold."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.serving.pressure_load import Load


@dataclass(frozen=True)
class Live:
    """Averages over a run: what sessions between their first and their last turn hold.

    Attributes:
        num_sessions: How many there are at a time.
        num_tokens: Of all of them, shared ones once: what a cache has to hold to forget nothing.
        num_unshared_tokens: The same with shared tokens once for each session.
    """

    num_sessions: float
    num_tokens: float
    num_unshared_tokens: float


def live(load: Load) -> Live:
    """What the sessions of a run hold on average over its time; one-shots hold nothing."""
    num_sessions = num_private = num_unshared = num_shared = 0.0
    spans: dict[str, list[tuple[float, float]]] = {}
    for session in load.sessions:
        num_system = load.shared_tokens[session.system["content"]]
        times = [begins_s for begins_s, _ in session.held] + [session.ends_s]
        whole = _within(times[0], times[-1], load.run_s)
        num_sessions += whole[1] - whole[0]
        spans.setdefault(session.system["content"], []).append(whole)
        for (_, num_tokens), span in zip(session.held, pairwise(times), strict=True):
            from_s, until_s = _within(*span, load.run_s)
            num_private += (num_tokens - num_system) * (until_s - from_s)
            num_unshared += num_tokens * (until_s - from_s)
    for system, each in spans.items():
        num_shared += load.shared_tokens[system] * _length(each)
    sums = (num_sessions, num_private + num_shared, num_unshared)
    return Live(*(number / load.run_s for number in sums))


def _within(from_s: float, until_s: float, run_s: float) -> tuple[float, float]:
    """The part of a span that lies in the run."""
    return min(max(from_s, 0.0), run_s), min(max(until_s, 0.0), run_s)


def _length(spans: Iterable[tuple[float, float]]) -> float:
    """Of the union of the spans."""
    total, reached = 0.0, float("-inf")
    for start_s, end_s in sorted(spans):
        total += max(0.0, end_s - max(start_s, reached))
        reached = max(reached, end_s)
    return total


def cache_blocks(share: float, lives: Sequence[Live], block_size: int) -> int:
    """The blocks that hold this share of what the sessions hold on average over some runs."""
    return round(share * sum(live.num_tokens for live in lives) / len(lives) / block_size)
