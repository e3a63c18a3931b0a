# SPDX-License-Identifier: Apache-2.0
"""Engine core: the prompts that it was sent, so that the next prompt can refer to them.

A base is immutable. Its key is the API process that sent it and that process's version number. The
store is bounded in bytes. A base that was given up costs one message and a second send, but never
an answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vllm_stateful.transport.header import (
    NO_VERSION,
    BaseMissError,
    ChecksumError,
    PromptHeader,
    checksum,
)
from vllm_stateful.types import TokenArray

BYTES_PER_TOKEN = 12
"""For a pointer in the tuple and an int32 in the array."""

BYTES_PER_HASH = 96
"""For a pointer and the digest. An upper bound, as the versions of a session share digests."""


@dataclass(eq=False, frozen=True, slots=True)
class Base:
    """One prompt as the engine core received it."""

    token_ids: tuple[int, ...]
    array: TokenArray
    """The same ids, shape ``[num_tokens]``."""
    hash_key: Hashable
    """What went into the block hashes beside the tokens (salt, LoRA)."""
    block_hashes: tuple[Any, ...]

    @property
    def cost(self) -> int:
        """The memory that the base counts as, in bytes."""
        return BYTES_PER_TOKEN * len(self.token_ids) + BYTES_PER_HASH * len(self.block_hashes)


class Prompt(NamedTuple):
    """A prompt that was rebuilt."""

    token_ids: list[int]
    array: TokenArray
    parent: Base | None
    """The base that it continues. The prompt may inherit the block hashes of this base."""
    num_parent_tokens: int


Key = tuple[str, int]


class BaseStore:
    """Prompts that were sent; the least recently used goes first. For the input thread only.

    Args:
        max_bytes: bytes that all bases together may cost (``Base.cost``).
        vocab_size: one more than the largest token id.
    """

    def __init__(self, max_bytes: int, vocab_size: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._bases: OrderedDict[Key, Base] = OrderedDict()
        self._parents: dict[Key, Key] = {}
        """For each base the parent that it replaces. The parent is kept in case a prompt still
        refers to it."""
        self._shared_ints = list(range(vocab_size))

    def __len__(self) -> int:
        return len(self._bases)

    def rebuild(self, header: PromptHeader, sent: Sequence[int]) -> Prompt:
        """Rebuild a prompt from its base and the ids that were sent.

        Raises:
            BaseMissError: the base is not here.
            ChecksumError: the result is not the prompt that was sent.
        """
        if header.parent == NO_VERSION:
            ids = self._shared(sent)
            prompt = Prompt(ids, np.array(ids, np.int32), None, 0)
        else:
            prompt = self._continue(header, sent)
        if header.checksum is not None and checksum(prompt.array) != header.checksum:
            raise ChecksumError(f"prompt {header} was put together wrongly")
        return prompt

    def _continue(self, header: PromptHeader, sent: Sequence[int]) -> Prompt:
        key = (header.client, header.parent)
        base, kept = self._bases.get(key), header.num_parent_tokens
        if base is None or len(base.token_ids) < kept:
            raise BaseMissError(f"no base {key}")
        self._bases.move_to_end(key)
        ids = list(base.token_ids)
        del ids[kept:]
        ids += self._shared(sent)
        array = np.concatenate([base.array[:kept], np.array(sent, np.int32)])
        return Prompt(ids, array, base, kept)

    def _shared(self, sent: Sequence[int]) -> list[int]:
        """The ids as integer objects that all bases share: 8 bytes per token instead of 36."""
        known = self._shared_ints
        size = len(known)
        return [known[i] if 0 <= i < size else i for i in sent]

    def keep(self, header: PromptHeader, base: Base) -> None:
        """Remember a prompt under its version.

        If nobody will continue its parent, the parent's own parent (the base of the turn before
        last) is dropped.
        """
        if header.version == NO_VERSION:
            return
        key = (header.client, header.version)
        self._drop(key)
        if header.parent_ends:
            parent = (header.client, header.parent)
            self._drop(self._parents.pop(parent, None))
            self._parents[key] = parent
        self._bases[key] = base
        self.num_bytes += base.cost
        while self.num_bytes > self.max_bytes and self._bases:
            self._drop(next(iter(self._bases)))

    def _drop(self, key: Key | None) -> None:
        base = None if key is None else self._bases.pop(key, None)
        if key is None or base is None:
            return
        self.num_bytes -= base.cost
        self._parents.pop(key, None)

    def clear(self) -> int:
        """Give up all bases, and return how many there were."""
        count = len(self._bases)
        self._bases.clear()
        self._parents.clear()
        self.num_bytes = 0
        return count
