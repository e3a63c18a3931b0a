# SPDX-License-Identifier: Apache-2.0
"""Writes a prompt's ids from an array into a row of model runner V2's table."""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.triton_utils import triton
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_stateful.adapters.worker.row_kernel import ROW_BLOCK, row_kernel
from vllm_stateful.types import TokenArray


def write_ids(table: Any, index: int, start: int, ids: TokenArray) -> None:
    """Hook of ``staged-ids``: write ids into a row of a ``StagedWriteTensor``, in stream order.

    Args:
        table: the int32 table.
        index: the index of the row.
        start: the column of the first id.
        ids: int32, shape ``[num_ids]``.
    """
    if not len(ids):
        return
    contents = async_tensor_h2d(np.require(ids, requirements="W"), device=table.device)
    grid = (triton.cdiv(len(ids), ROW_BLOCK),)
    row_kernel[grid](
        table.gpu, table.gpu.stride(0), index, start, contents, len(ids), BLOCK=ROW_BLOCK
    )
