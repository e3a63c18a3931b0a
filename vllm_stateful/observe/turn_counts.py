# SPDX-License-Identifier: Apache-2.0
"""Counts of turns, kept by the engine core and read by the API server."""

from collections import Counter, deque
from typing import Any

from vllm_stateful.types import Bypass, Demotion, Outcome

MAX_RECENT_LATENCIES = 4096


class TurnCounts:
    """Totals since the start. They are sent as a plain dict (``snapshot``)."""

    def __init__(self) -> None:
        self.outcomes: Counter[Outcome] = Counter()
        self.bypasses: Counter[Bypass] = Counter()
        self.edits: Counter[str] = Counter()
        self.num_tokens_reused = 0
        self.num_tokens_computed = 0
        self._latencies: deque[float] = deque(maxlen=MAX_RECENT_LATENCIES)

    def admitted(self, outcome: Outcome, num_reused: int, num_prompt: int) -> None:
        """Count a turn that was scheduled for the first time.

        Args:
            outcome: how it found its context.
            num_reused: tokens of its prompt whose KV was already there.
            num_prompt: tokens of its prompt.
        """
        self.outcomes[outcome] += 1
        self.num_tokens_reused += num_reused
        self.num_tokens_computed += num_prompt - num_reused

    def edited(self, kind: str) -> None:
        """Count a changed history, by the kind of the message in which the first change is."""
        self.edits[kind] += 1

    def bypassed(self, reason: Bypass) -> None:
        """Count a turn that was left to stock vLLM."""
        self.outcomes[Outcome.BYPASSED] += 1
        self.bypasses[reason] += 1

    def resumed_after(self, latency_s: float) -> None:
        """Add the host time that one turn spent on finding, verifying and adopting its KV."""
        self._latencies.append(latency_s)

    def snapshot(self, demotions: dict[Demotion, int]) -> dict[str, Any]:
        """All totals, and the latencies since the last snapshot, which are then forgotten."""
        latencies = list(self._latencies)
        self._latencies.clear()
        return {
            "turns": {str(key): value for key, value in self.outcomes.items()},
            "edits": dict(self.edits),
            "bypasses": {str(key): value for key, value in self.bypasses.items()},
            "demotions": {str(key): value for key, value in demotions.items()},
            "num_tokens_reused": self.num_tokens_reused,
            "num_tokens_computed": self.num_tokens_computed,
            "resume_latencies_s": latencies,
        }
