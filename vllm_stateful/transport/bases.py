# SPDX-License-Identifier: Apache-2.0
"""Engine core: the prompts that it was sent, so that the next one can refer to them.

A base is immutable and known by the API process that sent it and that process's version number.
Bounded in bytes; what is given up costs one message and a second send, never an answer.
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
"""A pointer in the tuple, and an int32 in the array."""

BYTES_PER_HASH = 96
"""A pointer, and the digest itself (shared by the versions of a session: an upper bound)."""


@dataclass(eq=False, frozen=True, slots=True)
class Base:
    """One prompt as the engine core received it."""

    token_ids: tuple[int, ...]
    array: TokenArray
    """The same ids, shape ``[num_tokens]``."""
    hash_key: Hashable
    """What beside the tokens went into the block hashes (salt, LoRA)."""
    block_hashes: tuple[Any, ...]

    @property
    def cost(self) -> int:
        """Bytes."""
        return BYTES_PER_TOKEN * len(self.token_ids) + BYTES_PER_HASH * len(self.block_hashes)


class Prompt(NamedTuple):
    """A prompt that was put together again."""

    token_ids: list[int]
    array: TokenArray
    parent: Base | None
    """The base that it continues, and therefore whose block hashes it may inherit."""
    num_parent_tokens: int


Key = tuple[str, int]


class BaseStore:
    """Least recently used bases first out. Used by one thread, the engine's input thread.

    Args:
        max_bytes: what all bases together may cost (``Base.cost``).
        vocab_size: one more than the largest token id.
    """

    def __init__(self, max_bytes: int, vocab_size: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._bases: OrderedDict[Key, Base] = OrderedDict()
        self._parents: dict[Key, Key] = {}
        """Bases that are kept only in case that somebody still refers to them."""
        self._shared_ints = list(range(vocab_size))

    def __len__(self) -> int:
        return len(self._bases)

    def rebuild(self, header: PromptHeader, sent: Sequence[int]) -> Prompt:
        """Put a prompt together from its base and what was sent.

        Raises:
            BaseMissError: its base is not here.
            ChecksumError: the result is not what the sender meant.
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
        """The same numbers as objects that all bases share: 8 bytes a token instead of 36."""
        known = self._shared_ints
        size = len(known)
        return [known[i] if 0 <= i < size else i for i in sent]

    def keep(self, header: PromptHeader, base: Base) -> None:
        """Remember a prompt under its version.

        The base of the turn before last goes: nobody continues it any more.
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
        """Give up everything; returns how many bases there were."""
        count = len(self._bases)
        self._bases.clear()
        self._parents.clear()
        self.num_bytes = 0
        return count
