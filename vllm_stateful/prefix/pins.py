# SPDX-License-Identifier: Apache-2.0
"""How many distinct blocks idle sessions keep from the free pool, against a budget."""

import numpy as np
from numpy.typing import NDArray

from vllm_stateful.types import BlockIds


class PinLedger:
    """Counts, for every block, the idle residencies that hold it.

    A block that ten sessions share (one system prompt) is one pinned block. A turn that runs
    on a residency takes its blocks out of the ledger: they are in use, not pinned.
    """

    def __init__(self, num_blocks: int, budget_blocks: int) -> None:
        self.budget_blocks = budget_blocks
        self.num_pinned = 0
        self.num_pinned_used = 0
        """Pinned blocks that running turns share. To give them back frees nothing."""
        self._holders = np.zeros(num_blocks, np.int32)
        self._users = np.zeros(num_blocks, np.int32)

    @property
    def over_budget(self) -> bool:
        return self.num_pinned > self.budget_blocks

    def pin(self, block_ids: BlockIds) -> None:
        """Add one holder to each block. Ids are distinct: a sequence holds a block once."""
        self._count(block_ids, -1)
        self._holders[block_ids] += 1
        self._count(block_ids, 1)

    def unpin(self, block_ids: BlockIds) -> None:
        """Take one holder from each block."""
        self._count(block_ids, -1)
        self._holders[block_ids] -= 1
        self._count(block_ids, 1)

    def use(self, block_ids: BlockIds) -> None:
        """A running turn shares these blocks with the residencies that hold them."""
        self._count(block_ids, -1)
        self._users[block_ids] += 1
        self._count(block_ids, 1)

    def unuse(self, block_ids: BlockIds) -> None:
        """It has ended."""
        self._count(block_ids, -1)
        self._users[block_ids] -= 1
        self._count(block_ids, 1)

    def holders(self, block_id: int) -> int:
        """The number of idle residencies that hold this block."""
        return int(self._holders[block_id])

    def users(self, block_id: int) -> int:
        """The number of running turns that were given this block by a residency."""
        return int(self._users[block_id])

    @property
    def holders_of_all(self) -> NDArray[np.int32]:
        """``[num_blocks]``: `holders` of each block, a view."""
        return _read_only(self._holders)

    @property
    def users_of_all(self) -> NDArray[np.int32]:
        """``[num_blocks]``: `users` of each block, a view."""
        return _read_only(self._users)

    @property
    def num_freeable(self) -> int:
        """Blocks that would be free if all idle residencies were given up."""
        return self.num_pinned - self.num_pinned_used

    def _count(self, block_ids: BlockIds, sign: int) -> None:
        pinned = self._holders[block_ids] > 0
        self.num_pinned += sign * int(np.count_nonzero(pinned))
        used = pinned & (self._users[block_ids] > 0)
        self.num_pinned_used += sign * int(np.count_nonzero(used))


def _read_only(array: NDArray[np.int32]) -> NDArray[np.int32]:
    view = array.view()
    view.flags.writeable = False
    return view
