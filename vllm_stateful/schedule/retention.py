# SPDX-License-Identifier: Apache-2.0
"""The order in which idle residencies give their blocks back.

Segmented LRU: all residencies of a worse class go before any of a better one, and within a
class the one that was used longest ago goes first. Every operation is O(1). The policy that
learns from tool gaps replaces the classes, not the callers.
"""

from collections import OrderedDict
from collections.abc import Hashable
from enum import IntEnum
from typing import Generic, TypeVar

R = TypeVar("R", bound=Hashable)


class Worth(IntEnum):
    """Retention classes, worst first."""

    SUPERSEDED = 0
    """A later turn of the session edited this history away."""
    ONE_SHOT = 1
    """No session id, and nobody has continued it so far."""
    SESSION = 2
    """Named by its client, or continued at least once."""


class RetentionQueue(Generic[R]):
    """Idle residencies, ordered by who goes first."""

    def __init__(self) -> None:
        self._classes: dict[Worth, OrderedDict[R, float]] = {w: OrderedDict() for w in Worth}

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._classes.values())

    def add(self, item: R, worth: Worth, now_s: float) -> None:
        """Enter ``item`` as the most recently used of its class."""
        self.discard(item)
        self._classes[worth][item] = now_s

    def discard(self, item: R) -> None:
        """Take ``item`` out; a no-op when it is not in."""
        for queue in self._classes.values():
            queue.pop(item, None)

    def next_victim(self, keep: R | None = None) -> R | None:
        """The residency to demote first, sparing ``keep``; None when nothing is left."""
        for queue in self._classes.values():
            for item in queue:
                if item != keep:
                    return item
        return None

    def expired(self, deadline_s: float) -> list[R]:
        """Those last used before ``deadline_s``, oldest first within each class."""
        found: list[R] = []
        for queue in self._classes.values():
            for item, used_s in queue.items():
                if used_s >= deadline_s:
                    break
                found.append(item)
        return found
