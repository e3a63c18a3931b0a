# SPDX-License-Identifier: Apache-2.0
"""Whether a sequence may read from the cache what another sequence writes in the same step.

vLLM counts a block as cached as soon as the step that fills it is scheduled, so a request that is
admitted in that very step can hit it (``KVCacheManager.allocate_slots``). Stock vLLM writes the K
and V of all sequences before any sequence attends. Our kernels write and attend in one launch,
which has no order between sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Lengths = Sequence[int] | NDArray[np.int32] | NDArray[np.int64]


def may_read_what_is_written(
    query_lens: Lengths,
    seq_lens: Lengths,
    page_size: int,
    *,
    may_be_new: Sequence[bool] | NDArray[np.bool_] | None = None,
    slack: int = 0,
) -> bool:
    """Whether such a read is possible, judged by lengths alone: may be true without need.

    Args:
        query_lens: New tokens of each sequence.
        seq_lens: Cached and new keys of each sequence, or upper bounds of them.
        page_size: Keys of a block. Only full blocks of another sequence can be hit.
        may_be_new: Whether each sequence may be in its first step. All others found their cached
            blocks in an earlier step. None: all may be.
        slack: By how much `seq_lens` may be too long.
    """
    new, total = np.asarray(query_lens, np.int64), np.asarray(seq_lens, np.int64)
    cached = total - new
    ready = np.ones(len(new), np.bool_) if may_be_new is None else np.asarray(may_be_new, np.bool_)
    ready = ready & (new > 0)
    if len(new) < 2 or not ready.any():
        return False
    # For each sequence the end of the first block that it fills in this step.
    filled = (np.maximum(cached - slack, 0) // page_size + 1) * page_size
    filled = np.where((new > 0) & (filled <= total), filled, np.iinfo(np.int64).max)
    first, second = np.partition(filled, 1)[:2]
    is_first = np.arange(len(new)) == int(np.argmin(filled))
    others = np.where(is_first, second, first)
    return bool((ready & (others <= cached)).any())
