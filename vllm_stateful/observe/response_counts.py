# SPDX-License-Identifier: Apache-2.0
"""Counts the requests that one API process answered from memory, for the metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import Any


class Response(StrEnum):
    """What became of a request that may be remembered; label of
    ``vllm_stateful_responses_total``."""

    HIT = "hit"
    """It was answered from memory."""
    JOINED = "joined"
    """It got the answer of an equal request that was in flight."""
    MISS = "miss"
    """The engine answered it."""
    STORED = "stored"
    """Its answer is remembered."""


class ResponseCounts:
    """Running totals of one process."""

    def __init__(self) -> None:
        self._responses = dict.fromkeys(Response, 0)
        self._uncached: Counter[str] = Counter()
        self._memory: Callable[[], int] = int

    def responded(self, how: Response) -> None:
        """Count one request that may be remembered."""
        self._responses[how] += 1

    def uncached(self, reason: str) -> None:
        """Count one request that may not be remembered."""
        self._uncached[reason] += 1

    def watch_memory(self, num_bytes: Callable[[], int]) -> None:
        """Set the function that returns the size of the remembered answers, in bytes."""
        self._memory = num_bytes

    def snapshot(self) -> dict[str, Any]:
        """Totals by the keys of ``observe.metrics``."""
        return {
            "responses": {str(how): n for how, n in self._responses.items()},
            "responses_uncached": dict(self._uncached),
            "response_cache_bytes": self._memory(),
        }


RESPONSE_COUNTS = ResponseCounts()
"""The counts of this process."""
