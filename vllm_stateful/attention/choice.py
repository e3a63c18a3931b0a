# SPDX-License-Identifier: Apache-2.0
"""Decides which batches our kernels take, from what is known when a step's metadata is built."""

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
        head_size: Elements of one head.
        group_size: Query heads of one KV head.
        page_size: Tokens of a block of the cache.
        is_half_precision: Whether the cache is bfloat16 or float16.
        capability: Major and minor compute capability of the device.
        is_fp8: Whether the cache is fp8 (e4m3) with a scale for each layer or head. False for all
            other caches.
        unusual: What a layer needs that the kernels do not support (sinks, ...); empty if nothing.
    """

    head_size: int
    group_size: int
    page_size: int
    is_half_precision: bool
    capability: tuple[int, int]
    is_fp8: bool = False
    unusual: str = ""


@dataclass(frozen=True)
class Batch:
    """What is known of the batch of a step.

    Attributes:
        max_query_len: The most new tokens of one sequence.
        num_tokens: New tokens of all sequences together.
        unusual: What the batch needs that the kernels do not support; empty if nothing.
    """

    max_query_len: int
    num_tokens: int
    unusual: str = ""


@dataclass(frozen=True)
class Graphs:
    """Which steps may be replayed from a CUDA graph that contains the attention.

    Attributes:
        most_tokens: The most new tokens of a step of any kind that may be replayed; 0: no step.
        most_query_len: The most new tokens per sequence in steps where all sequences have the same
            number, as when drafts are verified. 1: only decoding; 0: no such step.
        are_ours: Whether our kernels are captured for the steps of ``most_query_len``, if their
            sequences have more than one new token each.
    """

    most_tokens: int = 0
    most_query_len: int = 0
    are_ours: bool = False

    def has_ours(self, max_query_len: int) -> bool:
        """Whether a graph may replay a step of such sequences with our kernels."""
        return self.are_ours and 2 <= max_query_len <= self.most_query_len

    def has_theirs(self, batch: Batch) -> bool:
        """Whether a batch may be replayed with vLLM's kernel. It needs no plan then."""
        if batch.num_tokens <= self.most_tokens:
            return True
        return batch.max_query_len <= self.most_query_len and not self.are_ours


def why_never(layers: Layers) -> str:
    """Why our kernels take no batch of these layers; empty if they take some."""
    if layers.unusual:
        return layers.unusual
    if layers.head_size not in HEAD_SIZES:
        return f"head size {layers.head_size}"
    if not (layers.is_half_precision or layers.is_fp8):
        return "the KV cache is neither bfloat16, float16 nor fp8"
    if layers.page_size % PAGE_MULTIPLE:
        return f"blocks of {layers.page_size} tokens"
    if layers.capability < (8, 0):
        return f"compute capability {layers.capability[0]}.{layers.capability[1]}"
    return ""


def why_not(layers: Layers, graphs: Graphs, batch: Batch) -> str:
    """Why this batch is left to vLLM's own kernel; empty if our kernels take it."""
    if batch.unusual:
        return batch.unusual
    if batch.max_query_len < 2:
        return "decode"
    if batch.max_query_len > MOST_NEW_TOKENS:
        return "prefill"
    if graphs.has_theirs(batch):
        return "a CUDA graph of vLLM's"
    if layers.is_fp8 and layers.group_size * batch.max_query_len > ROWS_OF_MMA[-1]:
        return "fp8 and many rows"  # vLLM's kernel multiplies in fp8
    return ""


def may_be_captured(layers: Layers, max_query_len: int) -> bool:
    """Whether our kernels can take all steps of up to ``max_query_len`` tokens per sequence.

    A CUDA graph needs this: it is captured once for all such steps.
    """
    few = not layers.is_fp8 or layers.group_size * max_query_len <= ROWS_OF_MMA[-1]
    return few and max_query_len <= MOST_NEW_TOKENS


def tile_rows(layers: Layers, max_query_len: int) -> int:
    """Rows of a step's tiles: the smallest tile that holds the longest chunk, else the largest."""
    needed = layers.group_size * max_query_len
    for rows in ROWS_OF_MMA:
        if needed <= rows:
            return rows
    has_wgmma = layers.capability[0] == HOPPER and not layers.is_fp8
    return ROWS_OF_WGMMA if has_wgmma else ROWS_OF_MMA[-1]


def tile_rows_of_groups(layers: Layers, max_query_len: int, group_rows: int) -> int:
    """Rows of a step's tiles if sequences share tiles: enough for a whole group, up to a limit.

    Args:
        layers: The layers of the step.
        max_query_len: The most new tokens of one sequence.
        group_rows: Rows of the largest group; 0 without a group.
    """
    least = tile_rows(layers, max_query_len)
    needed = max(least, min(group_rows, max(ROWS_OF_MMA, default=0)))
    return next((rows for rows in ROWS_OF_MMA if rows >= needed), least)
