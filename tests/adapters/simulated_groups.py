# SPDX-License-Identifier: Apache-2.0
"""KV cache groups of the simulated engine: what each kind writes, and which slots it would read.

``full``: each position reads all before it. ``window``: the last ``WINDOW`` ones. ``chunk``: those
of its chunk. ``state``: the state that the block of the last token holds, as vLLM's mode ``align``
has it (``v1/worker/mamba_utils.preprocess_mamba``): the worker copies the running state to the
block of the chunk's last token, and overwrites it there.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)

WINDOW = 6
CHUNK = 12


def spec_of(kind: str, block_size: int) -> Any:
    """vLLM's spec of a group."""
    sizes: dict[str, Any] = {"block_size": block_size, "num_kv_heads": 1, "head_size": 1}
    sizes["dtype"] = torch.float32
    if kind == "window":
        return SlidingWindowSpec(**sizes, sliding_window=WINDOW)
    if kind == "chunk":
        return ChunkedLocalAttentionSpec(**sizes, attention_chunk_size=CHUNK)
    if kind == "state":
        return MambaSpec(
            block_size=block_size,
            shapes=((1,),),
            dtypes=(torch.float32,),
            page_size_padded=FullAttentionSpec(**sizes).page_size_bytes,
            mamba_cache_mode="align",
        )
    return FullAttentionSpec(**sizes)


def cache_config(kinds: tuple[str, ...], num_blocks: int, block_size: int) -> KVCacheConfig:
    """One group of each kind, in that order."""
    groups = [
        KVCacheGroupSpec([f"layer.{number}"], spec_of(kind, block_size))
        for number, kind in enumerate(kinds)
    ]
    return KVCacheConfig(num_blocks, [], groups)


def first_read(kind: str, position: int) -> int:
    """The first position whose slot is read for the token at a position."""
    if kind == "window":
        return max(0, position - WINDOW + 1)
    return position // CHUNK * CHUNK if kind == "chunk" else 0
