# SPDX-License-Identifier: Apache-2.0
"""Attention of a short chunk on a CPU: vLLM's kernel and ours, one after the other.

    LD_PRELOAD=.venv/lib/libiomp5.so python -m benchmarks.kernels.bench_cpu --threads 2

Each layer has a cache of its own, so that none is in the processor's caches when its turn comes, as
in a model. Times are medians of all layers of a step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from vllm import _custom_ops as vllm_ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_stateful.attention import cpu_ops

NEW_TOKENS = (1, 2, 3, 5, 9, 17, 33, 65, 129, 257)
SCALE = 0.125


class Layers:
    """The caches of one sequence in all layers, and a step on it."""

    def __init__(self, args: argparse.Namespace, new: int) -> None:
        dtype = getattr(torch, args.dtype)
        length, size, block = args.context + new, args.head_size, args.block_size
        blocks = -(-length // block)
        shape = (blocks, args.kv_heads, block, 2 * size)
        self.caches = [torch.randn(shape).to(dtype) for _ in range(args.layers)]
        self.table = torch.randperm(blocks).to(torch.int32)[None].contiguous()
        self.starts = torch.tensor([0, new], dtype=torch.int32)
        self.lengths = torch.tensor([length], dtype=torch.int32)
        self.q = torch.randn(new, args.heads, size).to(dtype)
        self.out = torch.empty_like(self.q)
        self.metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=args.heads,
            num_kv_heads=args.kv_heads,
            head_dim=size,
            seq_lens=self.lengths,
            dtype=dtype,
            query_start_loc=self.starts,
            causal=True,
            sliding_window_size=-1,
            isa=_get_attn_isa(dtype, block, size, "auto"),
            enable_kv_split=True,
            dynamic_causal=None,
            kv_cache_dtype="auto",
        )

    def vllms(self, cache: torch.Tensor) -> None:
        """One layer in vLLM's kernel."""
        blocks, heads, block, width = cache.shape
        keys, values = cache.view(blocks, heads, 2 * block, width // 2).chunk(2, dim=2)
        vllm_ops.cpu_attention_with_kv_cache(
            query=self.q,
            key_cache=keys,
            value_cache=values,
            output=self.out,
            query_start_loc=self.starts,
            seq_lens=self.lengths,
            scale=SCALE,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.table,
            softcap=0.0,
            scheduler_metadata=self.metadata,
            s_aux=None,
            dynamic_causal=None,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="auto",
        )

    def ours(self, cache: torch.Tensor) -> None:
        """One layer in ours."""
        cpu_ops.chunk_attention(
            self.q, cache, self.out, self.starts, self.lengths, self.table, SCALE
        )

    def milliseconds(self, attend: Callable[[torch.Tensor], None]) -> float:
        """Of all layers."""
        started = time.perf_counter()
        for cache in self.caches:
            attend(cache)
        return (time.perf_counter() - started) * 1e3


def main(arguments: Sequence[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--context", type=int, default=5216)
    add("--layers", type=int, default=30)
    add("--heads", type=int, default=9)
    add("--kv-heads", type=int, default=3)
    add("--head-size", type=int, default=64)
    add("--block-size", type=int, default=32)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--rounds", type=int, default=9)
    args = parser.parse_args(arguments)
    if reason := cpu_ops.why_unavailable():
        parser.error(reason)
    current_platform.import_kernels()
    torch.set_num_threads(args.threads)
    print(
        f"{args.layers} layers, {args.context} tokens cached, {args.dtype}, {args.threads} threads"
    )
    print("| new tokens | vLLM (ms) | ours (ms) | ratio |\n|---|---|---|---|")
    for new in NEW_TOKENS:
        step, times = Layers(args, new), ([], [])
        for _ in range(args.rounds):
            times[0].append(step.milliseconds(step.vllms))
            times[1].append(step.milliseconds(step.ours))
        vllms, ours = statistics.median(times[0]), statistics.median(times[1])
        print(f"| {new} | {vllms:.1f} | {ours:.1f} | {vllms / ours:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
