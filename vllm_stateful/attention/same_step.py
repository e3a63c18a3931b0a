# SPDX-License-Identifier: Apache-2.0
"""Whether a sequence may read from the cache what another one only writes in the same step.

vLLM counts a block as cached when the step that fills it is scheduled, so a request that is
admitted with that very step can hit it (``KVCacheManager.allocate_slots``). Stock writes the K and
V of all sequences before anybody attends; a launch that does both has no order between sequences.
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
    """By lengths alone: true too often, never too seldom.

    Args:
        query_lens: New tokens of each sequence.
        seq_lens: Cached and new keys of each, or upper bounds of them.
        page_size: Keys that are hit together: another sequence's block is hit when it is full.
        may_be_new: Sequences that may be in their first step; all others found what they have in
            an earlier one. None: all may be.
        slack: How much too long `seq_lens` may be.
    """
    new, total = np.asarray(query_lens, np.int64), np.asarray(seq_lens, np.int64)
    cached = total - new
    ready = np.ones(len(new), np.bool_) if may_be_new is None else np.asarray(may_be_new, np.bool_)
    ready = ready & (new > 0)
    if len(new) < 2 or not ready.any():
        return False
    filled = (np.maximum(cached - slack, 0) // page_size + 1) * page_size  # the first that is full
    filled = np.where((new > 0) & (filled <= total), filled, np.iinfo(np.int64).max)
    first, second = np.partition(filled, 1)[:2]
    is_first = np.arange(len(new)) == int(np.argmin(filled))
    others = np.where(is_first, second, first)
    return bool((ready & (others <= cached)).any())
