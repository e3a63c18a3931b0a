# SPDX-License-Identifier: Apache-2.0
"""Keeps the last turns of an engine core in the order of their admission, bounded in number."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator

from vllm_stateful.session.turn_record import TurnRecord

MAX_TURNS = 10_000
"""The most records. Each takes less than 2 KiB."""


_OF_ENGINE = re.compile(r"(?:\d+_)?(?P<name>.+)-[0-9a-f]{8}")
_NUMBERED = re.compile(r"(?P<name>.+)[-_]\d+")


class TurnLog:
    """Records by request id. The oldest is dropped first.

    Args:
        max_turns: the most records that are kept.
    """

    def __init__(self, max_turns: int = MAX_TURNS) -> None:
        self._max = max_turns
        self._records: OrderedDict[str, TurnRecord] = OrderedDict()
        self._of_client: dict[tuple[str | None, str], str] = {}
        """The engine's id of the last request that a client knows by a name, by its salt too."""

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: TurnRecord) -> None:
        """Add the record of a turn that was admitted."""
        self._records[record.request_id] = record
        self._records.move_to_end(record.request_id)
        for key in _keys(record):
            self._of_client[key] = record.request_id
        while len(self._records) > self._max:
            forgotten, gone = self._records.popitem(last=False)
            for key in _keys(gone):
                if self._of_client.get(key) == forgotten:
                    del self._of_client[key]

    def find(self, request_id: str, cache_salt: str | None) -> TurnRecord | None:
        """The record of a request, by the engine's id or by the client's.

        Args:
            request_id: either.
            cache_salt: that of the request; two clients may use one name.
        """
        found = self._records.get(request_id)
        return found or self._records.get(self._of_client.get((cache_salt, request_id), ""))

    def find_of_anybody(self, request_id: str) -> TurnRecord | None:
        """The last record of a request that any client knows by this name."""
        found = self._records.get(request_id)
        return found or next(
            (each for each in self.newest_first() if request_id in _names(each)), None
        )

    def newest_first(self) -> Iterator[TurnRecord]:
        """All records, the newest first."""
        return reversed(self._records.values())


def client_id(record: TurnRecord) -> str:
    """The id by which a client knows a request; the engine's own where it has no other form."""
    return next(iter(_names(record)), record.request_id)


def _keys(record: TurnRecord) -> list[tuple[str | None, str]]:
    """The salt of a request, with each id that its client may know."""
    return [(record.session.identity.cache_salt, name) for name in _names(record)]


def _names(record: TurnRecord) -> list[str]:
    """The ids that a client may know.

    vLLM's own id has eight more characters behind a dash. Before them stands the number of the
    prompt or of the call to a built-in tool, if there are several; in front that of the sample. A
    client's id may end with a number, too.
    """
    found = _OF_ENGINE.fullmatch(record.request_id)
    if found is None:
        return []
    numbered = _NUMBERED.fullmatch(found["name"])
    return [found["name"]] if numbered is None else [found["name"], numbered["name"]]
