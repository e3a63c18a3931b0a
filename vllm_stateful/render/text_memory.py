# SPDX-License-Identifier: Apache-2.0
"""Remembers recently tokenized texts, and finds them by their longest common prefix.

There is one memory per API process, bounded in bytes. A scope is a tenant and how special tokens
are added; scopes never see each other's texts. Nothing is keyed by a session id: the text itself
shows what it continues.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vllm_stateful.prefix.radix_tree import RadixTree
from vllm_stateful.render.safe_cuts import ByteArray, Cuts
from vllm_stateful.transport.prompt_ids import LastPlace

BYTES_PER_TOKEN = 8
"""For one pointer. The integers are shared by all entries (``IncrementalTokenizer``)."""

BYTES_PER_ANSWER_TOKEN = 40
"""For a pointer and an integer of its own."""

BYTES_PER_CUT = 16

BYTES_PER_ENTRY = 2048
"""For the entry's own objects and its nodes in the index, rounded up."""

CONTINUED_TAIL_BYTES = 512
"""Bytes that a known text may have behind the common prefix (a generation prompt) and still count
as continued by the new text. With more, the two texts are siblings."""

MAX_ANSWERS = 4
"""Answers kept per prompt (``n`` > 1, or the same prompt asked again)."""


@dataclass(eq=False, frozen=True, slots=True)
class Entry:
    """One tokenized text. Immutable."""

    scope: Hashable
    version: int
    num_bytes: int
    token_runs: tuple[tuple[int, ...], ...]
    """Its token ids in order, as runs that it may share with the text that it continues. They are
    tuples because the garbage collector stops looking at those after its first pass."""
    num_tokens: int
    cuts: Cuts
    last_places: dict[int, LastPlace]
    """What ``PromptTokenIds.last_place`` found. Filled when it is called."""
    digests: list[bytes]
    """The ``PromptTokenIds.digests``. Filled when ``digest_of`` is called."""
    answers: list[tuple[int, ...]]
    """Answers that were generated for this prompt, with ``--stateful-history generated``."""
    is_spliced: bool
    """Whether it holds generated ids in place of the ids of text that was rendered anew."""

    @property
    def cost(self) -> int:
        """The memory in bytes: text in the index, token ids (shared runs in full), cuts,
        answers."""
        return (
            self.num_bytes
            + BYTES_PER_TOKEN * self.num_tokens
            + BYTES_PER_ANSWER_TOKEN * sum(map(len, self.answers))
            + BYTES_PER_CUT * len(self.cuts)
            + BYTES_PER_ENTRY
        )


class Found(NamedTuple):
    """The entry with the longest prefix in common with a text, and the length of that prefix."""

    entry: Entry
    num_bytes: int

    @property
    def is_continued(self) -> bool:
        """Whether the text continues the entry, and is not a sibling of it."""
        return self.entry.num_bytes - self.num_bytes <= CONTINUED_TAIL_BYTES


class TextMemory:
    """A bounded set of entries; the least recently used one goes first. Thread-safe.

    Args:
        max_bytes: bytes that all entries together may cost (``Entry.cost``). A text that alone
            costs more is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._lock = threading.Lock()
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self._indexes: dict[Hashable, RadixTree[Entry]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, scope: Hashable, text: ByteArray) -> Found | None:
        """The entry of that scope with the longest common prefix, or None."""
        with self._lock:
            index = self._indexes.get(scope)
            if index is None:
                return None
            num_bytes, entry, _ = index.match(text)
            if entry is None:
                return None
            self._entries.move_to_end(entry.version)
            return Found(entry, num_bytes)

    def keep(self, text: ByteArray, made: Entry, instead_of: Found | None) -> None:
        """Remember a text, in place of the one that it continues."""
        with self._lock:
            if instead_of is not None and instead_of.is_continued:
                self._drop(instead_of.entry.version)
            if made.cost > self.max_bytes or len(text) == 0:
                return
            self._indexes.setdefault(made.scope, RadixTree(np.uint8)).insert(text, made)
            self._entries[made.version] = made
            self.num_bytes += made.cost
            self._shrink()

    def add_answer(self, version: int, token_ids: tuple[int, ...]) -> None:
        """Remember an answer to a prompt, up to ``MAX_ANSWERS`` per prompt."""
        with self._lock:
            entry = self._entries.get(version)
            if entry is None or len(entry.answers) >= MAX_ANSWERS:
                return
            before = entry.cost
            entry.answers.append(token_ids)
            self.num_bytes += entry.cost - before
            self._shrink()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._indexes.clear()
            self.num_bytes = 0

    def _shrink(self) -> None:
        while self.num_bytes > self.max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, version: int) -> None:
        entry = self._entries.pop(version, None)
        if entry is None:
            return
        self.num_bytes -= entry.cost
        index = self._indexes[entry.scope]
        index.remove(entry)
        if not len(index):
            del self._indexes[entry.scope]
