# SPDX-License-Identifier: Apache-2.0
"""What serves these steps elsewhere: FlashAttention 3 and Triton as in vLLM, FlashInfer, SDPA.

Each takes a step and returns a call for one layer, the write into the cache included. Plans are
made before, as a server makes them once a step for all layers. Libraries are imported where they
are used: one that is missing is that side's failure, not the benchmark's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from benchmarks.kernels.steps import HEAD_SIZE, HEADS, KV_HEADS, PAGE, SCALE, Regime, Tensors

Call = Callable[[Tensors], None]
WORKSPACE_BYTES = 256 << 20


@cache
def _one() -> torch.Tensor:
    """vLLM's scale of a layer without any, made once."""
    return torch.ones(1, device="cuda")


def _append(t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    from vllm.v1.attention.backends.fa_utils import reshape_and_cache_flash

    k_cache, v_cache = t.cache.transpose(1, 2).split(HEAD_SIZE, dim=-1)
    kind, to = "auto", (k_cache, v_cache)
    if t.cache.dtype == torch.float8_e4m3fn:
        kind, to = "fp8", (k_cache.view(torch.uint8), v_cache.view(torch.uint8))  # as in vLLM
    reshape_and_cache_flash(t.k, t.v, *to, t.slot_mapping, kind, _one(), _one())
    return k_cache, v_cache


def flash_attention(regime: Regime) -> Call:
    """FlashAttention as vLLM calls it: write, schedule once, attend."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    lengths = [a + b for a, b in zip(regime.new, regime.cached, strict=True)]
    starts = torch.tensor([0, *regime.new], device="cuda").cumsum(0).int()
    scheduled = get_scheduler_metadata(
        batch_size=len(lengths),
        max_seqlen_q=max(regime.new),
        max_seqlen_k=max(lengths),
        num_heads_q=HEADS,
        num_heads_kv=KV_HEADS,
        headdim=HEAD_SIZE,
        cache_seqlens=torch.tensor(lengths, device="cuda").int(),
        qkv_dtype=torch.float8_e4m3fn if regime.fp8 else torch.bfloat16,
        cu_seqlens_q=starts,
        page_size=16,
        causal=True,
    )
    one = torch.ones(len(lengths), KV_HEADS, device="cuda") if regime.fp8 else None

    def call(t: Tensors) -> None:
        k_cache, v_cache = _append(t)
        flash_attn_varlen_func(
            q=t.q,
            k=k_cache,
            v=v_cache,
            out=t.out,
            cu_seqlens_q=t.query_start,
            max_seqlen_q=max(regime.new),
            seqused_k=t.seq_lens,
            max_seqlen_k=max(lengths),
            softmax_scale=SCALE,
            causal=True,
            block_table=t.block_table,
            scheduler_metadata=scheduled,
            fa_version=3,
            q_descale=one,
            k_descale=one,
            v_descale=one,
        )

    return call


def unified_triton(regime: Regime) -> Call:
    """vLLM's Triton kernel."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    longest = max(a + b for a, b in zip(regime.new, regime.cached, strict=True))

    def call(t: Tensors) -> None:
        k_cache, v_cache = _append(t)
        unified_attention(
            q=t.q,
            k=k_cache,
            v=v_cache,
            out=t.out,
            cu_seqlens_q=t.query_start,
            max_seqlen_q=max(regime.new),
            seqused_k=t.seq_lens,
            max_seqlen_k=longest,
            softmax_scale=SCALE,
            causal=True,
            window_size=(-1, -1),
            block_table=t.block_table,
            softcap=0.0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
        )

    return call


class Pages:
    """A step's page tables as FlashInfer takes them: int32, by compressed rows.

    Attributes:
        rows: [sequences + 1], first new token of each.
        starts: [sequences + 1], first page of each in `indices`.
        indices: [pages], blocks of the cache.
        lengths: [sequences], keys, the new ones included.
        last: [sequences], keys on the last page.
    """

    def __init__(self, regime: Regime, t: Tensors) -> None:
        lengths = [a + b for a, b in zip(regime.new, regime.cached, strict=True)]
        pages = [-(-length // PAGE) for length in lengths]
        self.rows = torch.tensor([0, *regime.new]).cumsum(0).int()
        self.starts = torch.tensor([0, *pages]).cumsum(0).int()
        self.indices = torch.cat([t.block_table[i, :n] for i, n in enumerate(pages)]).contiguous()
        self.lengths = torch.tensor(lengths).int()
        self.last = torch.tensor([(length - 1) % PAGE + 1 for length in lengths]).int()


def _planned(plan: Callable[[Tensors], Any], run: Callable[[Any, Tensors], None]) -> Call:
    """A call that plans at its first sight of a layer's tensors, which is before the capture."""
    plans: dict[int, tuple[Tensors, Any]] = {}  # holds the tensors: an id is theirs while they live

    def call(t: Tensors) -> None:
        if id(t) not in plans:
            plans[id(t)] = (t, plan(t))
        run(plans[id(t)][1], t)

    return call


def flashinfer(regime: Regime, backend: str) -> Call:
    """FlashInfer's paged prefill, which is what vLLM calls for more than one new token."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")

    def plan(t: Tensors) -> Any:
        pages = Pages(regime, t)
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
        wrapper.plan(
            pages.rows,
            pages.starts,
            pages.indices,
            pages.last,
            HEADS,
            KV_HEADS,
            HEAD_SIZE,
            PAGE,
            causal=True,
            sm_scale=SCALE,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        return wrapper

    return _planned(plan, lambda wrapper, t: wrapper.run(t.q, _append(t), out=t.out))


def flashinfer_holistic(regime: Regime) -> Call:
    """FlashInfer's one persistent kernel for a mixed batch."""
    from flashinfer import BatchAttention

    def plan(t: Tensors) -> Any:
        pages = Pages(regime, t)
        attention = BatchAttention("NHD", "cuda")
        attention.plan(
            pages.rows.cuda(),
            pages.starts.cuda(),
            pages.indices,
            pages.lengths.cuda(),
            HEADS,
            KV_HEADS,
            HEAD_SIZE,
            HEAD_SIZE,
            PAGE,
            causal=True,
            sm_scale=SCALE,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        return attention

    def run(attention: Any, t: Tensors) -> None:
        attention.run(t.q, _append(t), out=t.out, logits_soft_cap=0.0)

    return _planned(plan, run)


def sdpa(regime: Regime) -> Call:
    """torch's own attention over keys and values that already lie in order: its best case.

    Only for one sequence; finding the pages is left out on this side.
    """
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.functional import scaled_dot_product_attention

    (num_new,), (num_cached,) = regime.new, regime.cached
    mask = causal_lower_right(num_new, num_cached + num_new)

    def gather(t: Tensors) -> torch.Tensor:  # [KV heads, keys, 2 head sizes]
        pages = t.cache[t.block_table[0].long()]
        keys = pages.transpose(0, 1).reshape(KV_HEADS, -1, 2 * HEAD_SIZE)
        return keys[:, : num_cached + num_new].contiguous()

    def run(kv: torch.Tensor, t: Tensors) -> None:
        kv[:, num_cached:, :HEAD_SIZE] = t.k.transpose(0, 1)
        kv[:, num_cached:, HEAD_SIZE:] = t.v.transpose(0, 1)
        keys, values = kv[None].split(HEAD_SIZE, dim=-1)
        queries = t.q.transpose(0, 1)[None]
        out = scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=SCALE, enable_gqa=True
        )
        t.out.copy_(out[0].transpose(0, 1))

    return _planned(gather, run)
