# SPDX-License-Identifier: Apache-2.0
"""Which batches the kernels take."""

from dataclasses import replace

import pytest

from vllm_stateful.attention.choice import (
    Batch,
    Graphs,
    Layers,
    may_be_captured,
    tile_rows,
    why_never,
    why_not,
)

LLAMA = Layers(head_size=128, group_size=4, page_size=16, is_half_precision=True, capability=(9, 0))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, ""),
        ({"head_size": 96}, "head size 96"),
        ({"is_half_precision": False}, "float16"),
        ({"page_size": 24}, "24 tokens"),
        ({"capability": (7, 5)}, "7.5"),
        ({"unusual": "sinks"}, "sinks"),
    ],
)
def test_layers(change: dict[str, object], says: str) -> None:
    reason = why_never(replace(LLAMA, **change))
    assert (says in reason) if says else not reason


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (Batch(1, 8), "decode"),
        (Batch(2, 8), ""),
        (Batch(512, 600), ""),
        (Batch(513, 600), "prefill"),
        (Batch(8, 8, "not causal"), "not causal"),
    ],
)
def test_batches(batch: Batch, says: str) -> None:
    assert why_not(LLAMA, Graphs(), batch) == says


def test_fp8_takes_few_rows() -> None:
    fp8 = replace(LLAMA, is_half_precision=False, is_fp8=True)
    assert not why_never(fp8)
    assert [why_not(fp8, Graphs(), Batch(each, each)) for each in (16, 17)] == [
        "",
        "fp8 and many rows",
    ]
    assert tile_rows(fp8, 512) == 64, "there is no kernel B for it"
    assert [may_be_captured(fp8, each) for each in (16, 17)] == [True, False]
    assert [may_be_captured(LLAMA, each) for each in (17, 512, 513)] == [True, True, False]


@pytest.mark.parametrize(
    ("graphs", "batch", "says"),
    [
        (Graphs(0, 1), Batch(2, 2), ""),  # graphs of decoding only
        (Graphs(0, 9), Batch(9, 90), "CUDA graph"),
        (Graphs(0, 9), Batch(10, 90), ""),
        (Graphs(0, 9, are_ours=True), Batch(9, 90), ""),
        (Graphs(64, 9), Batch(40, 64), "CUDA graph"),
        (Graphs(64, 9), Batch(40, 65), ""),
    ],
)
def test_what_vllm_may_replay_is_left_to_it(graphs: Graphs, batch: Batch, says: str) -> None:
    reason = why_not(LLAMA, graphs, batch)
    assert (says in reason) if says else not reason


def test_only_steps_of_a_few_tokens_each_are_captured_with_ours() -> None:
    ours = Graphs(0, 9, are_ours=True)
    assert [ours.has_ours(each) for each in (1, 2, 9, 10)] == [False, True, True, False]
    assert not Graphs(0, 9).has_ours(9)


def test_tiles() -> None:
    assert [tile_rows(LLAMA, each) for each in (2, 4, 5, 8, 16, 17, 512)] == [
        16,
        16,
        32,
        32,
        64,
        128,
        128,
    ]
    assert tile_rows(replace(LLAMA, capability=(8, 0)), 512) == 64
