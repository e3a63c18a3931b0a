# SPDX-License-Identifier: Apache-2.0
"""Which batches the kernels take."""

from dataclasses import replace

import pytest

from vllm_stateful.attention.choice import Batch, Layers, tile_rows, why_never, why_not

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
        (Batch(1), "decode"),
        (Batch(2), ""),
        (Batch(512), ""),
        (Batch(513), "prefill"),
        (Batch(8, "not causal"), "not causal"),
    ],
)
def test_batches(batch: Batch, says: str) -> None:
    assert why_not(batch) == says


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
