# SPDX-License-Identifier: Apache-2.0
"""Counts the requests that asked why not more of the cache was reused, in one API process."""

from __future__ import annotations

from collections import Counter
from typing import Any


class DiagnosisCounts:
    """Running totals of one process."""

    def __init__(self) -> None:
        self._results: Counter[str] = Counter()

    def add(self, result: str) -> None:
        """Count one request by what was found."""
        self._results[result] += 1

    def snapshot(self) -> dict[str, Any]:
        """Totals by the keys of ``observe.metrics``."""
        return {"cache_diagnostics": dict(self._results)}


DIAGNOSIS_COUNTS = DiagnosisCounts()
"""The counts of this process."""
