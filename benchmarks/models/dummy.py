# SPDX-License-Identifier: Apache-2.0
"""Llamas that are only a config: vLLM makes up their weights (`--load-format dummy`).

Nothing they say means anything; what they cost is what a model of that shape costs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.models import CACHE, published, smollm2

SHAPES: dict[str, dict[str, int]] = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
}


def write_config(folder: Path, shape: str, **changes: Any) -> None:
    """The config alone: for requests that are token ids.

    Args:
        changes: What is to differ from the shape, `num_hidden_layers` or `max_position_embeddings`.
    """
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **SHAPES[shape],
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_weights(folder: Path) -> None:
    """Weights beside a config with which attention matters; those of vLLM are next to nothing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).float()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, 1.5 / weight.shape[1] ** 0.5)
    model.save_pretrained(folder)


def ensure_dummy(shape: str) -> Path:
    """A folder with SmolLM2's tokenizer beside it, whose vocabulary is smaller than the model's."""
    path = CACHE / f"dummy-{shape}"
    if not path.is_dir():
        with published(path) as out:
            write_config(out, shape)
            smollm2.copy_tokenizer(out)
    return path
