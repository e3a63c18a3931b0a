# SPDX-License-Identifier: Apache-2.0
"""How many distinct blocks idle sessions keep from the free pool, against a budget."""

import numpy as np

from vllm_stateful.types import BlockIds


class PinLedger:
    """Counts, for every block, the idle residencies that hold it.

    A block that ten sessions share (one system prompt) is one pinned block. A turn that runs
    on a residency takes its blocks out of the ledger: they are in use, not pinned.
    """

    def __init__(self, num_blocks: int, budget_blocks: int) -> None:
        self.budget_blocks = budget_blocks
        self.num_pinned = 0
        self._holders = np.zeros(num_blocks, np.int32)

    @property
    def over_budget(self) -> bool:
        return self.num_pinned > self.budget_blocks

    def pin(self, block_ids: BlockIds) -> None:
        """Add one holder to each block. Ids are distinct: a sequence holds a block once."""
        self.num_pinned += int(np.count_nonzero(self._holders[block_ids] == 0))
        self._holders[block_ids] += 1

    def unpin(self, block_ids: BlockIds) -> None:
        """Take one holder from each block."""
        self._holders[block_ids] -= 1
        self.num_pinned -= int(np.count_nonzero(self._holders[block_ids] == 0))

    def holders(self, block_id: int) -> int:
        """The number of idle residencies that hold this block."""
        return int(self._holders[block_id])
