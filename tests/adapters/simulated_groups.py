# SPDX-License-Identifier: Apache-2.0
"""KV cache groups of the simulated engine: what each kind writes, and which slots it would read.

``full``: each position reads all before it. ``window``: the last ``WINDOW`` ones. ``chunk``: those
of its chunk. ``state``: the state that the block of the last token holds, as vLLM's mode ``align``
has it (``v1/worker/mamba_utils.preprocess_mamba``): the worker copies the running state to the
block of the chunk's last token, and overwrites it there. Beside drafts each token of a step leaves
a state, in blocks side by side, and the next step begins with the one that was accepted.
``head``: the KV of a draft head, which each position makes of its prefix and the token behind it.

``window*2`` is a group whose blocks are twice as long.
"""

from __future__ import annotations

from types import SimpleNamespace
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


def spec_of(kind: str, block_size: int, num_drafts: int = 0) -> Any:
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
            num_speculative_blocks=num_drafts,
        )
    return FullAttentionSpec(**sizes)


def parted(kind: str) -> tuple[str, int]:
    """A kind, and how many times as long its blocks are."""
    name, _, times = kind.partition("*")
    return name, int(times or 1)


def cache_config(
    kinds: tuple[str, ...],
    num_blocks: int,
    block_size: int,
    retention: int | None,
    num_drafts: int = 0,
) -> KVCacheConfig:
    """One group of each kind, in that order."""
    groups = []
    for number, (kind, times) in enumerate(map(parted, kinds)):
        spec = spec_of(kind, times * block_size, num_drafts)
        groups.append(KVCacheGroupSpec([f"layer.{number}"], spec, kind == "head"))
    config = KVCacheConfig(num_blocks, [], groups)
    config.prefix_cache_retention_interval = retention
    return config


def first_read(kind: str, position: int) -> int:
    """The first position whose slot is read for the token at a position."""
    if kind == "window":
        return max(0, position - WINDOW + 1)
    return position // CHUNK * CHUNK if kind == "chunk" else 0


def head_config() -> Any:
    """The part of vLLM's ``SpeculativeConfig`` that a scheduler asks, of an EAGLE head."""
    return SimpleNamespace(
        method="eagle",
        draft_sample_method="greedy",
        rejection_sample_method="standard",
        num_speculative_tokens=1,
        max_num_new_slots_for_drafting=1,
        num_speculative_tokens_per_batch_size=None,
        use_eagle=lambda: True,
        use_eagle_block_drop=lambda: True,
        needs_eagle_block_drop=lambda: True,
        disable_eagle_block_drop=False,
        disable_lookahead_block_hashes=False,
        use_dspark=lambda: False,
        use_dflash=lambda: False,
        use_multi_module_mtp=lambda: False,
        uses_draft_model=lambda: False,
    )


MARKERS = ("<|im_start|>", "<think>", "</think>", "<tool_call>")
ROLES = ("system\n", "user\n", "assistant\n", "tool\n")


class Vocabulary:
    """A tokenizer whose last token ids are markers of ChatML, and whose others are words.

    Args:
        size: ids that it has.
        has_roles: whether the ids before the markers are roles, each with a line break.
    """

    def __init__(self, size: int, *, has_roles: bool = False) -> None:
        last = [*ROLES, *MARKERS] if has_roles else [*MARKERS]
        self._texts = [f"word{token} " for token in range(size - len(last))] + last

    def get_vocab(self) -> dict[str, int]:
        return {text: token for token, text in enumerate(self._texts)}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self._texts[token] for token in ids)
