# SPDX-License-Identifier: Apache-2.0
"""Counts hints of clients that could not be read, in one API process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from vllm_stateful.types import HintSource


class HintCounts:
    """Running totals of one process."""

    def __init__(self) -> None:
        self._ignored: Counter[HintSource] = Counter()

    def ignore(self, sources: Iterable[HintSource]) -> None:
        """Count hints of one request that were ignored, each source once."""
        self._ignored.update(set(sources))

    def snapshot(self) -> dict[str, Any]:
        """Totals by the keys of ``observe.metrics``."""
        return {"hints_ignored": {str(source): count for source, count in self._ignored.items()}}


HINT_COUNTS = HintCounts()
"""The counts of this process."""
