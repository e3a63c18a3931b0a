# SPDX-License-Identifier: Apache-2.0
"""Sides for test_bench_kernels.py: one that is right, and one for each way to fail."""

from __future__ import annotations

import os
import time

from benchmarks.kernels.peers import Call
from benchmarks.kernels.steps import SCALE, Regime, Tensors
from vllm_stateful.attention.oracle import append_oracle, attention_oracle


def make_call(name: str, regime: Regime) -> Call:
    if name == "mma 64":
        return _right
    return {
        "is wrong": _wrong,
        "forgets the cache": _forgets,
        "ends the process": _ends,
        "ends it later": _Later(),
        "hangs": _hangs,
    }[name]


def _right(t: Tensors) -> None:
    tables = (t.block_table, t.query_start, t.seq_lens)
    t.out.copy_(attention_oracle(t.q, t.k, t.v, t.cache, *tables, SCALE))
    append_oracle(t.cache, t.k, t.v, t.slot_mapping)


def _wrong(t: Tensors) -> None:
    _right(t)
    t.out[0, 0] += 0.1


def _forgets(t: Tensors) -> None:
    before = t.cache.clone()
    _right(t)
    t.cache.copy_(before)


def _ends(t: Tensors) -> None:
    os._exit(7)


class _Later:
    """Right as long as it is checked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, t: Tensors) -> None:
        self.calls += 1
        if self.calls > 2:
            os._exit(8)
        _right(t)


def _hangs(t: Tensors) -> None:
    time.sleep(600)
