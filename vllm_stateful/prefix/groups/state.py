# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers: Mamba, gated delta nets, KDA, short convolutions.

All that was read is one state, and the next token overwrites it. vLLM's mode ``align`` keeps the
state of a running request in the block that its last token falls into, and begins a new block where
one is full. So the state at the end of a block stays; elsewhere a copy must be made of it before
the next token is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_stateful.prefix.groups.table import Group


@dataclass(frozen=True)
class StateGroup(Group):
    """A position can be continued where its state is held."""

    is_state: ClassVar[bool] = True

    def first(self, position: int) -> int:
        """The block of the last token before the position: its state is there, and only there."""
        return max(0, position - self.lookahead - 1) // self.block_size
