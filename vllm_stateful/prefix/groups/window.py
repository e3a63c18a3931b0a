# SPDX-License-Identifier: Apache-2.0
"""Attention to what is near: sliding windows and local chunks.

Blocks are written once, so those of the last window can be held where they are: a later token goes
behind them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_stateful.prefix.groups.table import Group


@dataclass(frozen=True)
class WindowGroup(Group):
    """Each token attends to the last ones before it.

    Attributes:
        window: tokens that one attends to, itself included, and those that are kept besides.
    """

    window: int = field(default=1, kw_only=True)

    def first(self, position: int) -> int:
        """The block of the first token that the one at the position attends to."""
        return max(0, position - self.lookahead - self.window + 1) // self.block_size


@dataclass(frozen=True)
class ChunkGroup(Group):
    """Each token attends to those before it in its chunk (Llama 4).

    Attributes:
        chunk: tokens of a chunk.
    """

    chunk: int = field(default=1, kw_only=True)

    def first(self, position: int) -> int:
        """The block in which the chunk of the token at the position begins."""
        position = max(0, position - self.lookahead)
        return position // self.chunk * self.chunk // self.block_size
