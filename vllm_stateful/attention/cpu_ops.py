# SPDX-License-Identifier: Apache-2.0
"""torch.ops.vllm_stateful_cpu: attention of short chunks over a long cache, on x86 CPUs."""

from __future__ import annotations

from functools import cache

import torch

from vllm_stateful.attention.libraries import CPU, library

LIBRARY = library(CPU)
DTYPES = (torch.float32, torch.bfloat16)
MULTIPLE = 32
"""Head sizes and block sizes must be multiples of this."""

MOST_NEW_TOKENS = 64
"""The most new tokens of a turn. From about twice as many on, vLLM's kernel is as fast
(benchmarks/details/kernels-and-gpu.md)."""


@cache
def why_unavailable() -> str:
    """Why the compiled kernel cannot be called here; empty if it can."""
    if not LIBRARY.exists():
        return "vllm_stateful was built without its CPU kernel (no C++ compiler, or not x86-64)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}"
    _register_fake()
    if not torch.ops.vllm_stateful_cpu.is_supported():
        return "this CPU has no AVX2"
    return ""


def _register_fake() -> None:
    @torch.library.register_fake("vllm_stateful_cpu::chunk_attention")  # type: ignore[untyped-decorator]
    def _(*_: object) -> None:
        """Do nothing: the op only writes into its arguments."""


def chunk_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    out: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    *,
    soft_cap: float = 0.0,
    window: int = 0,
) -> None:
    """Attend from new tokens to a paged cache that already contains their own K and V.

    Args:
        q: ``[tokens, heads, D]``, float32 or bfloat16, D a multiple of 32.
        kv_cache: ``[blocks, KV heads, block size, 2 D]``, as vLLM's CPU backend lays it out for
            ``vec``: each head of a block holds K as ``[D, block size]``, then V as ``[block
            size, D]``. The block size is a multiple of 32.
        out: ``[tokens, heads, D]``; written.
        query_start: ``[sequences + 1]`` int32: the first new token of each sequence, and the end.
        seq_lens: ``[sequences]`` int32: cached and new tokens of each sequence.
        block_table: ``[sequences, blocks]`` int32.
        scale: The factor of the scores.
        soft_cap: Scores become ``cap * tanh(score / cap)``; 0: no cap.
        window: Keys that a token sees, its own included; 0: all.

    Raises:
        RuntimeError: the kernel is not available here, or the tensors do not fit.
    """
    if reason := why_unavailable():
        raise RuntimeError(reason)
    torch.ops.vllm_stateful_cpu.chunk_attention(
        q, kv_cache, out, query_start, seq_lens, block_table, scale, soft_cap, window
    )
