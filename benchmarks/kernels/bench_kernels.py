# SPDX-License-Identifier: Apache-2.0
"""Delta append attention against what vLLM has, on one device, the append included on all sides.

    python -m benchmarks.kernels.bench_kernels [--rounds 5] [--seconds 200] [--out out/kernels.json]

Each side is captured into a CUDA graph that goes over several copies of the cache, more than the
second level cache holds, and the graphs are replayed turn about. First every side is compared with
float64. Needs a CUDA device; a side whose library is not there is named with the reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo import machine
from benchmarks.kernels import peers
from benchmarks.kernels.steps import (
    HEAD_SIZE,
    HEADS,
    KV_HEADS,
    SCALE,
    Regime,
    Tensors,
    make,
    regimes,
)
from vllm_stateful.attention import ops, triton_attention
from vllm_stateful.attention.oracle import attention_oracle
from vllm_stateful.attention.plan import Shape, SharedPrefix, make_plan

COLD_BYTES = 200 << 20  # four times the second level cache of an H200
MOST_COPIES = 8
MOST_ORACLE_PAIRS = 3e8


def ours(regime: Regime, rows: int, is_grouped: bool = False) -> peers.Call:
    """Our kernel for tiles of so many rows."""
    shape = Shape(
        num_ctas=ops.num_ctas(torch.bfloat16, HEAD_SIZE, rows, 0, fp8=regime.fp8),
        tile_rows=rows,
        block_keys=ops.block_keys(HEAD_SIZE, rows),
        num_kv_heads=KV_HEADS,
        group_size=HEADS // KV_HEADS,
    )
    together = SharedPrefix(tuple(range(len(regime.new))), regime.num_shared)
    lengths = [a + b for a, b in zip(regime.new, regime.cached, strict=True)]
    plan = make_plan(regime.new, lengths, shape, prefixes=[together] if is_grouped else [])
    there = ops.DevicePlan.of(plan, rows, HEAD_SIZE, torch.device("cuda"))
    one = torch.ones(1, device="cuda")
    scales = ops.Scales(one, one, one) if regime.fp8 else None
    return partial(_call, ops.delta_append_attention, there, scales=scales)


def in_triton(regime: Regime) -> peers.Call:
    """Our Triton kernels."""
    shape = Shape(264, 64, triton_attention.BLOCK_KEYS[HEAD_SIZE], KV_HEADS, HEADS // KV_HEADS)
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


def sides(regime: Regime) -> dict[str, Callable[[], peers.Call]]:
    """Every kernel that may serve this step, by name."""
    packed = max(regime.new) * HEADS // KV_HEADS
    tiles = [rows for rows in (16, 32, 64) if packed <= rows or rows == 64]
    in_mma = {f"mma {rows}": partial(ours, regime, rows) for rows in tiles}
    if regime.fp8:
        return {"FA3": partial(peers.flash_attention, regime), **in_mma}
    made: dict[str, Callable[[], peers.Call]] = {
        "FA3": partial(peers.flash_attention, regime),
        "vLLM Triton": partial(peers.unified_triton, regime),
        "FlashInfer fa2": partial(peers.flashinfer, regime, "fa2"),
        "FlashInfer fa3": partial(peers.flashinfer, regime, "fa3"),
        "FlashInfer holistic": partial(peers.flashinfer_holistic, regime),
    }
    if len(regime.new) == 1:
        made["SDPA, KV gathered before"] = partial(peers.sdpa, regime)
    made |= in_mma
    if packed > 32:
        made["wgmma"] = partial(ours, regime, ops.WGMMA_ROWS)
    if regime.num_shared:
        made["mma 64, grouped"] = partial(ours, regime, 64, True)
        made["wgmma, grouped"] = partial(ours, regime, ops.WGMMA_ROWS, True)
    made["our Triton"] = partial(in_triton, regime)
    return made


def error_of(regime: Regime, call: peers.Call) -> float:
    """Relative error against float64; NaN where that would take too long."""
    pairs = sum(a * b for a, b in zip(regime.new, regime.cached, strict=True)) * HEADS
    if pairs > MOST_ORACLE_PAIRS:
        return float("nan")
    t = make(regime, 1)
    before = t.cache.clone()
    call(t)
    k, v = (each.to(before.dtype) for each in (t.k, t.v))  # fp8: as the cache has them
    expected = attention_oracle(t.q, k, v, before, t.block_table, t.query_start, t.seq_lens, SCALE)
    return float((t.out.double() - expected).norm() / expected.norm())


def captured(call: peers.Call, copies: list[Tensors], passes: int) -> torch.cuda.CUDAGraph:
    """A graph of so many passes over all copies."""
    for each in copies:
        call(each)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(passes):
            for each in copies:
                call(each)
    return graph


def microseconds(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    """Of one call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1000 / calls


def measure(regime: Regime, rounds: int) -> list[dict[str, object]]:
    """One row for each side, or the reason why it has no time."""
    one = make(regime, 0)
    size = one.cache.nbytes
    copies = [one] + [make(regime, i + 1) for i in range(min(MOST_COPIES - 1, COLD_BYTES // size))]
    passes = max(1, 32 // len(copies))
    graphs, rows = {}, {}
    for name, make_call in sides(regime).items():
        row: dict[str, object] = {"step": regime.name, "side": name}
        try:
            call = make_call()
            row["error"] = error_of(regime, call)
            graphs[name] = captured(call, copies, passes)
        except (
            Exception
        ) as error:  # of a library, whatever it is: that side has no time, and says so
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        rows[name] = row
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds + 1):
        for name, graph in graphs.items():
            times[name].append(microseconds(graph, passes * len(copies)))
    floor = regime.floor_s() * 1e6
    for name, samples in times.items():
        median = statistics.median(samples[1:])
        rows[name] |= {"us": median, "of_floor": floor / median, "floor_us": floor}
    return list(rows.values())


def table(rows: list[dict[str, object]]) -> str:
    """Time, share of the floor, and how many times faster than FA3."""
    fa3 = {row["step"]: row["us"] for row in rows if row["side"] == "FA3" and "us" in row}
    lines = ["| step | side | us | of floor | FA3 / this | error |", "|---|---|---|---|---|---|"]
    for row in rows:
        start = f"| {row['step']} | {row['side']} | "
        if "us" not in row:
            lines.append(f"{start}{row['failed']} | | | |")
            continue
        us = float(str(row["us"]))
        ratio = f"{float(str(fa3[row['step']])) / us:.2f}" if row["step"] in fa3 else ""
        share = float(str(row["of_floor"]))
        lines.append(f"{start}{us:.1f} | {share:.0%} | {ratio} | {row['error']:.1e} |")
    return "\n".join(lines)


def main() -> int:
    """Measure all steps, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no step after them")
    parser.add_argument("--out", default="out/kernels.json")
    args = parser.parse_args()
    if reason := ops.why_unavailable():
        print(f"nothing is measured: {reason}", file=sys.stderr)
        return 1
    rows: list[dict[str, object]] = []
    until = time.monotonic() + args.seconds
    for regime in regimes():
        if time.monotonic() > until:
            print(f"not measured, time was up: {regime.name}", flush=True)
            continue
        rows += measure(regime, args.rounds)
        torch.cuda.empty_cache()
        print(table(rows[-len(sides(regime)) :]), flush=True)
    about = machine.describe() | {"device": torch.cuda.get_device_name()}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(about | {"rows": rows}, indent=1))
    print(f"\n{table(rows)}\n\nwritten: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
