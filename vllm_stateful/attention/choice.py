# SPDX-License-Identifier: Apache-2.0
"""Which batches the kernels take, by what is known when a step's metadata is built."""

from __future__ import annotations

from dataclasses import dataclass

HEAD_SIZES = (64, 128, 256)
MOST_NEW_TOKENS = 512
PAGE_MULTIPLE = 16
ROWS_OF_MMA = (16, 32, 64)
ROWS_OF_WGMMA = 128
HOPPER = 9


@dataclass(frozen=True)
class Layers:
    """What all attention layers of a group have in common.

    Attributes:
        capability: Major and minor compute capability of the device.
        unusual: What a layer asks for that the kernels do not know (sinks, ...).
    """

    head_size: int
    group_size: int
    page_size: int
    is_half_precision: bool
    capability: tuple[int, int]
    unusual: str = ""


@dataclass(frozen=True)
class Batch:
    """What is known of a step.

    Attributes:
        max_query_len: New tokens of the longest.
        unusual: What the batch asks for that the kernels do not know; empty: nothing.
    """

    max_query_len: int
    unusual: str = ""


def why_never(layers: Layers) -> str:
    """Why no batch of these layers is taken; empty: some are."""
    if layers.unusual:
        return layers.unusual
    if layers.head_size not in HEAD_SIZES:
        return f"head size {layers.head_size}"
    if not layers.is_half_precision:
        return "the KV cache is neither bfloat16 nor float16"
    if layers.page_size % PAGE_MULTIPLE:
        return f"blocks of {layers.page_size} tokens"
    if layers.capability < (8, 0):
        return f"compute capability {layers.capability[0]}.{layers.capability[1]}"
    return ""


def why_not(batch: Batch) -> str:
    """Why this batch is left to vLLM's own kernel; empty: it is taken."""
    if batch.unusual:
        return batch.unusual
    if batch.max_query_len < 2:
        return "decode"
    if batch.max_query_len > MOST_NEW_TOKENS:
        return "prefill"
    return ""


def tile_rows(layers: Layers, max_query_len: int) -> int:
    """Rows of the tiles: the smallest that holds the longest chunk, or the largest there is."""
    needed = layers.group_size * max_query_len
    for rows in ROWS_OF_MMA:
        if needed <= rows:
            return rows
    return ROWS_OF_WGMMA if layers.capability[0] == HOPPER else ROWS_OF_MMA[-1]
