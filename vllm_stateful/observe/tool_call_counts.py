# SPDX-License-Identifier: Apache-2.0
"""Counts the tool calls that one API process checked while they were generated."""

from __future__ import annotations

from collections import Counter
from typing import Any


class ToolCallCounts:
    """Running totals of one process. The labels are those of ``answer.tool_call_stream``."""

    def __init__(self) -> None:
        self._checked: Counter[str] = Counter()
        self._unchecked: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()

    def checked(self, results: Counter[Any]) -> None:
        """Count the calls of one answer by their result."""
        self._checked.update({str(result): num for result, num in results.items()})

    def unchecked(self, reasons: Counter[Any]) -> None:
        """Count calls, or requests with tools, that were not judged, by reason."""
        self._unchecked.update({str(reason): num for reason, num in reasons.items()})

    def ended(self, why: str) -> None:
        """Count one turn that was ended at a tool call, by the reason: complete or invalid."""
        self._ended[why] += 1

    def snapshot(self) -> dict[str, Any]:
        """Totals by the keys of ``observe.metrics``."""
        return {
            "tool_calls_checked": dict(self._checked),
            "tool_calls_unchecked": dict(self._unchecked),
            "turns_ended_at_tool_call": dict(self._ended),
        }


TOOL_CALL_COUNTS = ToolCallCounts()
"""The counts of this process."""
