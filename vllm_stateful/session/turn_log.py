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
        self._of_client: dict[str, str] = {}
        """The engine's id of the last request that a client knows by a name."""

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: TurnRecord) -> None:
        """A turn was admitted."""
        self._records[record.request_id] = record
        self._records.move_to_end(record.request_id)
        self._of_client[_name_of_client(record.request_id)] = record.request_id
        while len(self._records) > self._max:
            forgotten, _ = self._records.popitem(last=False)
            name = _name_of_client(forgotten)
            if self._of_client.get(name) == forgotten:
                del self._of_client[name]

    def find(self, request_id: str) -> TurnRecord | None:
        """The record of a request, by the engine's id or by the client's."""
        found = self._records.get(request_id)
        return found or self._records.get(self._of_client.get(request_id, ""))

    def newest_first(self) -> Iterator[TurnRecord]:
        """All records."""
        return reversed(self._records.values())


def _name_of_client(request_id: str) -> str:
    """vLLM's own id is the client's with eight more characters behind a dash."""
    return request_id.rpartition("-")[0]
