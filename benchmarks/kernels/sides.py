# SPDX-License-Identifier: Apache-2.0
"""Who may serve a step: our kernels, and the peers of `peers`, by name.

A name may carry options behind a comma, for sweeps: ``mma 64, overhead 2``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.kernels import peers
from benchmarks.kernels.steps import HEAD_SIZE, HEADS, KV_HEADS, SCALE, Regime, Tensors
from vllm_stateful.attention import ops, triton_attention
from vllm_stateful.attention.choice import ROWS_OF_MMA
from vllm_stateful.attention.plan import Shape, SharedPrefix, make_plan

GROUP_SIZE = HEADS // KV_HEADS
FA3 = "FA3"
SDPA = "SDPA, KV gathered before"  # finds no pages, and leaves the cache as it is
GROUPED = "grouped"


def ours(regime: Regime, rows: int, *options: str) -> peers.Call:
    """Our kernel for tiles of so many rows.

    Args:
        options: ``grouped``, or a number for a field of the plan's shape: ``overhead 2``.
    """
    shape = Shape(
        num_ctas=ops.num_ctas(torch.bfloat16, HEAD_SIZE, rows, 0, fp8=regime.fp8),
        tile_rows=rows,
        block_keys=ops.block_keys(HEAD_SIZE, rows),
        num_kv_heads=KV_HEADS,
        group_size=GROUP_SIZE,
    )
    for option in options:
        name, _, value = option.partition(" ")
        if name != GROUPED:
            shape = dataclasses.replace(shape, **{name: int(value)})
    together = SharedPrefix(tuple(range(len(regime.new))), regime.num_shared)
    lengths = [a + b for a, b in zip(regime.new, regime.cached, strict=True)]
    plan = make_plan(regime.new, lengths, shape, prefixes=[together] if GROUPED in options else [])
    there = ops.DevicePlan.of(plan, rows, HEAD_SIZE, torch.device("cuda"))
    there.partial_out.fill_(float("nan"))
    there.partial_lse.fill_(float("nan"))
    one = torch.ones(1, device="cuda")
    scales = ops.Scales(one, one, one) if regime.fp8 else None
    return partial(_call, ops.delta_append_attention, there, scales=scales)


def in_triton(regime: Regime) -> peers.Call:
    """Our Triton kernels."""
    shape = Shape(264, 64, triton_attention.BLOCK_KEYS[HEAD_SIZE], KV_HEADS, GROUP_SIZE)
    lengths = [a + b for a, b in zip(regime.new, regime.cached, strict=True)]
    plan = make_plan(regime.new, lengths, shape)
    there = ops.DevicePlan.of(plan, 64, HEAD_SIZE, torch.device("cuda"))
    return partial(_call, triton_attention.delta_append_attention, there)


def _call(kernel: Callable[..., None], plan: ops.DevicePlan, t: Tensors, **options: Any) -> None:
    kernel(
        t.q,
        t.k,
        t.v,
        t.cache,
        t.out,
        t.block_table,
        t.query_start,
        t.seq_lens,
        t.slot_mapping,
        plan,
        SCALE,
        **options,
    )


PEERS: dict[str, Callable[[Regime], peers.Call]] = {
    FA3: peers.flash_attention,
    "FlashInfer fa2": partial(peers.flashinfer, backend="fa2"),
    "FlashInfer fa3": partial(peers.flashinfer, backend="fa3"),
    "FlashInfer holistic": peers.flashinfer_holistic,
    "vLLM Triton": peers.unified_triton,
    SDPA: peers.sdpa,
}
OUR_TRITON = "our Triton"


def is_ours(name: str) -> bool:
    """Whether its answers have to be as exact as ours."""
    return name not in PEERS


def names(regime: Regime) -> list[str]:
    """Who is compared in a step: FA3, all tiles of ours that fit, then the others."""
    packed = max(regime.new) * GROUP_SIZE
    tiles = [f"mma {rows}" for rows in ROWS_OF_MMA if packed <= rows or rows == ROWS_OF_MMA[-1]]
    if regime.fp8:
        return [FA3, *tiles]
    if packed > 32:
        tiles.append("wgmma")
    if regime.num_shared:
        tiles += [f"mma 64, {GROUPED}", f"wgmma, {GROUPED}"]
    others = [name for name in PEERS if name != FA3 and (name != SDPA or len(regime.new) == 1)]
    return [FA3, *tiles, *others, OUR_TRITON]


def make_call(name: str, regime: Regime) -> peers.Call:
    """A call of this side for this step.

    Raises:
        KeyError: there is no side of this name.
    """
    if name in PEERS:
        return PEERS[name](regime)
    if name == OUR_TRITON:
        return in_triton(regime)
    kernel, *options = name.split(", ")
    rows = {"wgmma": ops.WGMMA_ROWS} | {f"mma {rows}": rows for rows in ROWS_OF_MMA}
    return ours(regime, rows[kernel], *options)
