# SPDX-License-Identifier: Apache-2.0
"""Layers that our CUDA kernels do not know are left to vLLM, and counted so where all are such."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType

from vllm_stateful.adapters.worker.attention_backend import StatefulImpl, what_all_ask_for


@pytest.fixture
def config() -> Iterator[VllmConfig]:
    made = VllmConfig()
    with set_current_vllm_config(made):
        yield made


def impl(**options: Any) -> StatefulImpl:
    usual = {"num_heads": 4, "head_size": 64, "scale": 0.1, "num_kv_heads": 2}
    usual |= {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"}
    return StatefulImpl(**usual | options)


def layer(config: VllmConfig, name: str, **options: Any) -> str:
    """An attention layer as vLLM registers it, but for its projections."""
    made = Attention.__new__(Attention)
    torch.nn.Module.__init__(made)
    made.impl = impl(**options)
    config.compilation_config.static_forward_context[name] = made
    return name


@pytest.mark.parametrize(
    ("options", "unknown"),
    [
        ({}, ""),
        ({"sliding_window": 100}, ""),
        ({"logits_soft_cap": 30.0}, ""),
        ({"alibi_slopes": [1.0] * 4}, "ALiBi"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "KV of another layer"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "encoder_only attention"),
    ],
)
def test_what_a_layer_asks_for(config: VllmConfig, options: dict[str, Any], unknown: str) -> None:
    assert impl(**options).unknown == unknown


def test_no_plan_is_made_where_no_layer_could_follow_it(config: VllmConfig) -> None:
    names = [layer(config, "0", alibi_slopes=[1.0] * 4), layer(config, "1", alibi_slopes=[1.0] * 4)]
    assert what_all_ask_for(config, names) == "ALiBi"
    names.append(layer(config, "2"))
    assert not what_all_ask_for(config, names)
    assert not what_all_ask_for(config, ["of another group"])
