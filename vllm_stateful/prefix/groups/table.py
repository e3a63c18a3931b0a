# SPDX-License-Identifier: Apache-2.0
"""Parts of block tables, and the positions that they make it possible to continue at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from vllm_stateful.types import BlockIds

Blocks = list[Any]
"""Block handles in sequence order; opaque here, vLLM's ``KVCacheBlock`` in production."""

NO_IDS: BlockIds = np.empty(0, np.int32)


@dataclass(frozen=True)
class Group(ABC):
    """How the layers of one KV cache group keep what they need.

    Attributes:
        block_size: tokens per block.
        lookahead: tokens that must be the same behind what is kept, since it depends on them: a
            draft head's KV of a token is made of the next token as well. A position with a
            lookahead counts them; what is kept ends so many tokens before it.
    """

    block_size: int
    lookahead: int = field(default=0, kw_only=True)

    is_full: ClassVar[bool] = False
    """Every position can be continued where the blocks before it are held."""
    is_state: ClassVar[bool] = False
    """A block holds a state, which the next token overwrites."""

    @abstractmethod
    def first(self, position: int) -> int:
        """The place in the block table of the first block that is needed at a position."""

    def end(self, position: int) -> int:
        """One more than the place of the last block that is needed at a position."""
        return -(-max(0, position - self.lookahead) // self.block_size)


@dataclass(eq=False, slots=True)
class Table:
    """Blocks of one group, from a place in its block table on. What is before is not held."""

    start: int
    blocks: Blocks
    ids: BlockIds

    @classmethod
    def of(cls, blocks: Blocks, start: int = 0, known: BlockIds = NO_IDS) -> Table:
        """A table of blocks, of which the ids of the first are known."""
        new = blocks[len(known) :]
        ids = np.fromiter((block.block_id for block in new), np.int32, len(new))
        return cls(start, blocks, np.concatenate([known, ids]) if len(known) else ids)

    @classmethod
    def empty(cls) -> Table:
        return cls(0, [], NO_IDS)

    def keep(self, count: int) -> Table:
        """Hold no more than the first blocks. Returns those that are given up."""
        given = Table(self.start + count, self.blocks[count:], self.ids[count:])
        self.blocks, self.ids = self.blocks[:count], self.ids[:count]
        return given


Tables = tuple[Table, ...]
"""One for each group, in vLLM's order. Empty for a group that it says nothing of."""


@dataclass(eq=False, slots=True)
class ResumePoint:
    """A position that can be continued, and what is held for it of the groups that are not full.

    It has a reference of its own on each of its blocks.
    """

    position: int
    tables: Tables
    is_shared: bool = False
    """Others are expected to start here: the end of system and tools, a fork that was seen."""
    is_question: bool = False
    """Here ends a prompt whose last message is the user's. Templates that keep reasoning while
    tools are called strip it at the next question, so the next prompt may part here."""
    is_answer: bool = False
    """A segment of an answer begins here. The next prompt may write the segment in another way
    (harmony's templates do); once it has come, the point is worth nothing."""

    @property
    def ids(self) -> BlockIds:
        """The ids of all its blocks. No id occurs twice: a block has one place in one group."""
        return joined_ids(self.tables)

    @property
    def blocks(self) -> Blocks:
        return joined_blocks(self.tables)


def joined_ids(tables: Iterable[Table]) -> BlockIds:
    """The ids of all blocks of some tables, shape ``[num_blocks]``."""
    filled = [table.ids for table in tables if len(table.ids)]
    if len(filled) == 1:
        return filled[0]
    return np.concatenate(filled) if filled else NO_IDS


def joined_blocks(tables: Iterable[Table]) -> Blocks:
    """All blocks of some tables, in the order of eviction reversed: the last goes first."""
    return [block for table in tables for block in table.blocks]
