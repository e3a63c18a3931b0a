# SPDX-License-Identifier: Apache-2.0
"""The last turns of an engine core, in the order in which they were admitted. Bounded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from vllm_stateful.session.turn_record import TurnRecord

MAX_TURNS = 10_000
"""About 1 KiB each."""


class TurnLog:
    """Records by request id; the oldest goes first.

    Args:
        max_turns: records that are kept.
    """

    def __init__(self, max_turns: int = MAX_TURNS) -> None:
        self._max = max_turns
        self._records: OrderedDict[str, TurnRecord] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: TurnRecord) -> None:
        """A turn was admitted."""
        self._records[record.request_id] = record
        self._records.move_to_end(record.request_id)
        while len(self._records) > self._max:
            self._records.popitem(last=False)

    def find(self, request_id: str) -> TurnRecord | None:
        """The record of a request, by the engine's id or by the client's.

        vLLM's own id is the client's with eight more characters behind a dash.
        """
        found = self._records.get(request_id)
        if found is not None:
            return found
        for name, record in reversed(self._records.items()):
            if name.rpartition("-")[0] == request_id:
                return record
        return None

    def newest_first(self) -> Iterator[TurnRecord]:
        """All records."""
        return reversed(self._records.values())
