# SPDX-License-Identifier: Apache-2.0
"""What a metadata builder is told of shared prefixes: of its own batch, or nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_stateful.adapters.slots import OnStep
from vllm_stateful.adapters.worker.batch_prefixes import note_batch, shared_in
from vllm_stateful.attention.plan import SharedPrefix
from vllm_stateful.attention.shared_prefixes import SharedKeys

NONE = (-1, -1)


def builder(window: int | None = None, *layer_windows: Any) -> Any:
    layers = {
        f"layer {place}": SimpleNamespace(impl=SimpleNamespace(sliding_window=each))
        for place, each in enumerate(layer_windows or (NONE, NONE))
    }
    compilation = SimpleNamespace(static_forward_context=layers)
    return SimpleNamespace(
        kv_cache_spec=SimpleNamespace(sliding_window=window),
        vllm_config=SimpleNamespace(compilation_config=compilation),
        layer_names=list(layers),
    )


@pytest.fixture
def common() -> Any:
    """Metadata of the batch that was noted last."""
    batch = SimpleNamespace(idx_mapping_np=np.array([4, 0, 2]), req_ids=["c", "a", "b"])
    output = SimpleNamespace(stateful=OnStep(shared=(SharedKeys(("a", "c", "gone"), 512),)))
    note_batch(batch, output)
    return SimpleNamespace(req_idx=batch.idx_mapping_np)


def test_requests_are_told_by_their_places(common: Any) -> None:
    expected = [SharedPrefix((0, 1), 512)]
    assert shared_in(builder(), common) == expected
    assert shared_in(builder(), common) == expected  # of each group of layers


def test_another_batch_gets_nothing(common: Any) -> None:
    assert not shared_in(builder(), SimpleNamespace(req_idx=common.req_idx.copy()))
    assert not shared_in(builder(), SimpleNamespace(req_idx=None))
    batch = SimpleNamespace(idx_mapping_np=np.array([4, 0, 2]), req_ids=["c", "a", "b"])
    note_batch(batch, SimpleNamespace())
    assert not shared_in(builder(), SimpleNamespace(req_idx=batch.idx_mapping_np))
    assert not shared_in(builder(), common)


@pytest.mark.parametrize(
    "made",
    [builder(128), builder(None, NONE, (127, 0)), builder(None, NONE, None)],
    ids=["all", "a layer", "not known"],
)
def test_nothing_is_shared_where_a_layer_may_have_a_window(made: Any, common: Any) -> None:
    assert not shared_in(made, common)


def test_a_layer_without_kernels_is_not_known(common: Any) -> None:
    made = builder()
    made.layer_names.append("elsewhere")
    assert not shared_in(made, common)
