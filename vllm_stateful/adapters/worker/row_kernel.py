# SPDX-License-Identifier: Apache-2.0
"""Writes token ids into a row of a table on the device, in the order of the stream."""

from vllm.triton_utils import tl, triton

ROW_BLOCK = 1024
"""Elements that one program writes."""


@triton.jit(do_not_specialize=["index", "start", "count"])
def row_kernel(
    table_ptr,  # int32 [num_rows, stride]
    stride,
    index,
    start,
    ids_ptr,  # int32 [count]
    count,
    BLOCK: tl.constexpr,
):
    """Do ``table[index, start : start + count] = ids``, one block per program."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = table_ptr + tl.cast(index, tl.int64) * stride + start
    tl.store(row + place, tl.load(ids_ptr + place, mask=place < count), mask=place < count)
