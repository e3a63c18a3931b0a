# SPDX-License-Identifier: Apache-2.0
"""One side of `bench_kernels` in a process of its own: prepares a step, then times it when asked.

    python -m benchmarks.kernels.worker SIDE [--sides MODULE] [--library FILE]

SIDE ``float64`` computes what must come out instead. The questions are in `Side`.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.workers import Answer, serve
from benchmarks.kernels import steps
from benchmarks.kernels.peers import Call
from benchmarks.kernels.steps import SCALE, Regime, Tensors, make
from vllm_stateful.attention import ops
from vllm_stateful.attention.oracle import attention_oracle

ORACLE = "float64"
COLD_BYTES = 200 << 20  # four times the second level cache of an H200
MOST_COPIES = 8
LEAST_CALLS = 32  # in a replay
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHECKED_SEED = 1


def expected_of(regime: Regime) -> torch.Tensor:
    """The result in float64."""
    t = make(regime, CHECKED_SEED, DEVICE)
    k, v = (each.to(t.cache.dtype) for each in (t.k, t.v))  # fp8: as the cache has them
    return attention_oracle(t.q, k, v, t.cache, t.block_table, t.query_start, t.seq_lens, SCALE)


def error_of(call: Call, regime: Regime, expected: torch.Tensor, *, appends: bool) -> float:
    """Relative error of a call, twice over the same plan; the worse one.

    Args:
        appends: It writes the new keys and values into the cache.

    Raises:
        ValueError: the cache is not what it was with the new keys and values in their slots.
    """
    t = make(regime, CHECKED_SEED, DEVICE)
    before = t.cache.clone()
    worst = 0.0
    for _ in range(2):  # the second call meets what the first one left
        t.out.fill_(float("nan"))
        call(t)
        error = float((t.out.double() - expected).norm() / expected.norm())
        worst = max(worst, error if error == error else float("inf"))
    if not appends:
        return worst
    page = before.shape[2]
    new = torch.cat([t.k, t.v], dim=-1).to(before.dtype)
    rows = before.transpose(1, 2)  # [blocks, page, KV heads, 2 D]
    rows.view(torch.uint8 if regime.fp8 else rows.dtype)[
        t.slot_mapping // page, t.slot_mapping % page
    ] = new.view(torch.uint8 if regime.fp8 else new.dtype)
    if not torch.equal(before.view(torch.uint8), t.cache.view(torch.uint8)):
        raise ValueError("the cache is not what it should be")
    return worst


class Graph:
    """So many passes over all copies in a CUDA graph."""

    def __init__(self, call: Call, copies: list[Tensors]) -> None:
        self._call, self._copies = call, copies  # the graph reads what they hold
        passes = max(1, LEAST_CALLS // len(copies))
        self.num_calls = passes * len(copies)
        for each in copies:
            call(each)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(passes):
                for each in copies:
                    call(each)

    def microseconds(self) -> float:
        """Of one call, in a replay."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1000 / self.num_calls


class Loop:
    """The same where there are no graphs: on a CPU, to try the benchmark itself."""

    def __init__(self, call: Call, copies: list[Tensors]) -> None:
        self._call, self._copies = call, copies

    def microseconds(self) -> float:
        """Of one call."""
        begin = time.perf_counter()
        for each in self._copies:
            self._call(each)
        return (time.perf_counter() - begin) * 1e6 / len(self._copies)


class Side:
    """Answers ``{"do": "prepare", "step": ..., "expected": file}`` with the error,
    ``{"do": "time"}`` with microseconds, and ``{"do": "expect", ...}`` by writing the file."""

    def __init__(self, name: str, make_call: Callable[[str, Regime], Call]) -> None:
        self._name, self._make_call = name, make_call
        self._steps = {regime.name: regime for regime in steps.all_regimes()}
        self._timed: Graph | Loop | None = None

    def answer(self, question: dict[str, Any]) -> Answer:
        """See the class."""
        if question["do"] == "time":
            assert self._timed is not None
            return {"us": self._timed.microseconds()}
        regime, file = self._steps[question["step"]], Path(question["expected"])
        if question["do"] == "expect":
            torch.save(expected_of(regime).cpu(), file)
            return {}
        self._timed = None  # and its memory
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        call = self._make_call(self._name, regime)
        expected = torch.load(file).to(DEVICE)
        error = error_of(call, regime, expected, appends=question["appends"])
        if error <= question["most_error"]:
            one = make(regime, 0, DEVICE)
            more = min(MOST_COPIES - 1, COLD_BYTES // one.cache.nbytes)
            copies = [one, *(make(regime, i + 2, DEVICE) for i in range(more))]
            self._timed = Graph(call, copies) if DEVICE == "cuda" else Loop(call, copies)
        return {"error": error}


def main() -> None:
    """Answer until there are no more questions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("side")
    parser.add_argument("--sides", default="benchmarks.kernels.sides", help="has make_call")
    parser.add_argument("--library", type=Path, help="our kernels, built otherwise")
    args = parser.parse_args()
    if args.library:
        ops.LIBRARY = args.library
    side = Side(args.side, importlib.import_module(args.sides).make_call)
    serve(side.answer)


if __name__ == "__main__":
    main()
