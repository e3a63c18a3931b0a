# SPDX-License-Identifier: Apache-2.0
"""Model families in small: configurations that vLLM 0.32 serves on a CPU from made-up weights.

vLLM's own made-up weights are next to nothing: no answer depends on what was read. `liven` makes
them matter. Then a state that was resumed at a wrong token changes the answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.models import CACHE, published, smollm2

VOCAB = 2048
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
_TWO_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_GDN: dict[str, Any] = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "full_attention_interval": 4,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 192,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
_DEEPSEEK: dict[str, Any] = {
    **_MLA,
    "q_lora_rank": 32,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "rope_theta": 1e4,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
}


class Family(NamedTuple):
    """One family: its architecture, its config, the data type its CPU kernels take."""

    architecture: str
    model_type: str
    dtype: str
    shape: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return {
            **_BASE,
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "torch_dtype": self.dtype,
            **self.shape,
        }


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "llama", "float32", {"num_hidden_layers": 3}),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        "float32",
        {
            "num_hidden_layers": 6,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 32,
            "rope_parameters": _TWO_ROPES,
        },
    ),
    "gemma4": Family(
        "Gemma4ForCausalLM",
        "gemma4_text",
        "float32",
        {
            "num_hidden_layers": 6,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "global_head_dim": 64,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCAB,
        },
    ),
    "gptoss": Family(
        "GptOssForCausalLM",
        "gpt_oss",
        "float32",
        {
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "head_dim": 64,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_theta": 150000,
        },
    ),
    "llama4": Family(
        "Llama4ForCausalLM",
        "llama4_text",
        "float32",
        {
            "intermediate_size_mlp": 128,
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 512,
            "rope_theta": 5e5,
        },
    ),
    "qwen3next": Family(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        "bfloat16",
        {
            **_GDN,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "decoder_sparse_step": 1,
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.5,
            "mlp_only_layers": [],
        },
    ),
    "qwen3_5": Family(
        "Qwen3_5ForCausalLM",
        "qwen3_5_text",
        "bfloat16",
        {
            **_GDN,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "nemotronh": Family(
        "NemotronHForCausalLM",
        "nemotron_h",
        "float32",
        {
            "num_hidden_layers": 4,
            "hybrid_override_pattern": "M*M-",
            "mamba_num_heads": 16,  # see MAMBA2
            "mamba_head_dim": 64,
            "n_groups": 2,
            "ssm_state_size": 128,
            "conv_kernel": 4,
            "chunk_size": 64,
            "mlp_hidden_act": "relu2",
        },
    ),
    "deepseek": Family("DeepseekV3ForCausalLM", "deepseek_v3", "float32", _DEEPSEEK),
    "deepseek_v32": Family(
        "DeepseekV32ForCausalLM",
        "deepseek_v32",
        "bfloat16",
        {**_DEEPSEEK, "index_topk": 2048, "index_head_dim": 128, "index_n_heads": 64},
    ),
    "glm5": Family(
        "GlmMoeDsaForCausalLM",
        "glm_moe_dsa",
        "bfloat16",
        {**_DEEPSEEK, "index_topk": 2048, "index_head_dim": 128, "index_n_heads": 32},
    ),
    "kimi_linear": Family(
        "KimiLinearForCausalLM",
        "kimi_linear",
        "bfloat16",
        {
            **_MLA,
            "q_lora_rank": None,
            "mla_use_nope": True,
            "num_hidden_layers": 4,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "linear_attn_config": {
                "kda_layers": [1, 2, 3],
                "full_attn_layers": [4],
                "num_heads": 2,
                "head_dim": 128,
                "short_conv_kernel_size": 4,
            },
        },
    ),
    "lfm2": Family(
        "Lfm2ForCausalLM",
        "lfm2",
        "float32",
        {
            "num_hidden_layers": 4,
            "block_dim": 64,
            "conv_dim": 64,
            "conv_dim_out": 64,
            "conv_L_cache": 3,
            "block_multiple_of": 32,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "conv", "full_attention", "conv"],
            "rope_theta": 1e6,
        },
    ),
    "mamba": Family(
        "MambaForCausalLM",
        "mamba",
        "float32",
        {"num_hidden_layers": 3, "state_size": 16, "conv_kernel": 4, "expand": 2},
    ),
    "mamba2": Family(
        "Mamba2ForCausalLM",
        "mamba2",
        "float32",
        {
            "num_hidden_layers": 3,
            "num_heads": 2,
            "head_dim": 64,
            "state_size": 128,
            "n_groups": 1,
            "conv_kernel": 4,
            "expand": 2,
            "chunk_size": 64,
        },
    ),
    "jamba": Family(
        "JambaForCausalLM",
        "jamba",
        "float32",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
        },
    ),
    "falcon_h1": Family(
        "FalconH1ForCausalLM",
        "falcon_h1",
        "float32",
        {
            "num_hidden_layers": 3,
            "mamba_d_ssm": 1024,
            "mamba_n_heads": 16,  # see MAMBA2
            "mamba_d_head": 64,
            "mamba_n_groups": 1,
            "mamba_d_state": 128,
            "mamba_d_conv": 4,
            "mamba_chunk_size": 64,
            "rope_theta": 1e6,
        },
    ),
    "minimax_m2": Family(
        "MiniMaxM2ForCausalLM",
        "minimax_m2",
        "float32",
        {
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "scoring_func": "softmax",  # its own, sigmoid, has no CPU router
            "use_routing_bias": False,
            "rotary_dim": 16,
            "rope_theta": 1e6,
            "use_qk_norm": True,
        },
    ),
}


MAMBA2 = 2176
"""Tokens in a block of the models with Mamba 2 layers, from the size of a state.

vLLM 0.32.0 ends with an IndexError on a CPU where a step would keep a state at a block's end within
a chunk: its scan gives back the last state alone. So no prompt may be longer than a block.
"""
NOT_ON_CPU = {
    "deepseek_v32": "NotImplementedError: Sparse Attention is not supported on CPU.",
    "glm5": "NotImplementedError: Sparse Attention is not supported on CPU.",
    "jamba": "AttributeError: '_OpNamespace' '_C' object has no attribute 'selective_scan_fwd'",
    "kimi_linear": "ModuleNotFoundError: No module named 'cutlass'",
    "mamba": "AttributeError: '_OpNamespace' '_C' object has no attribute 'selective_scan_fwd'",
}
"""Families that vLLM 0.32.0's CPU build cannot serve, and what it says. Their configs are right."""
SERVED = tuple(family for family in FAMILIES if family not in NOT_ON_CPU)


def write(family: str, folder: Path) -> None:
    """Write `config.json`: all that vLLM needs with `load_format="dummy"` and no tokenizer."""
    (folder / "config.json").write_text(json.dumps(FAMILIES[family].config))


def ensure(family: str, max_len: int) -> Path:
    """A folder with a family's config, of any length, beside SmolLM2's tokenizer."""
    path = CACHE / f"family-{family}-{max_len}"
    if not path.is_dir():
        vocabulary = json.loads((smollm2.ensure() / "config.json").read_text())["vocab_size"]
        changes = {"vocab_size": vocabulary, "max_position_embeddings": max_len}
        with published(path) as out:
            (out / "config.json").write_text(json.dumps(FAMILIES[family].config | changes))
            smollm2.copy_tokenizer(out)
    return path


def liven() -> None:
    """Have every model that this process makes up from here on depend on what it reads.

    Matrices are normal with a deviation of 1.5 / sqrt(inputs), norms are near one, states decay
    over 10 to 150 tokens. A weight depends on its name alone. Call it before `LLM(...)`, with the
    engine in this process.
    """
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    stock = DummyModelLoader.load_weights

    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        stock(self, model, model_config)
        for name, weight in model.named_parameters():
            if weight.is_floating_point():
                _set(name, weight.data)

    DummyModelLoader.load_weights = load_weights


def _set(name: str, weight: Any) -> None:
    """Fill one weight, of any shape `(..., inputs)`, in place."""
    import zlib

    import torch

    random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    last = name.rsplit(".", 1)[-1]
    drawn = torch.rand(weight.shape, generator=random)  # from 0 to 1
    if last == "A":
        drawn = -torch.exp(-5 + 3 * drawn)
    elif last == "A_log":
        drawn = -5 + 3 * drawn
    elif weight.dim() > 1:
        drawn = torch.randn(weight.shape, generator=random) * 1.5 / weight.shape[-1] ** 0.5
    elif "norm" in name:
        drawn = 0.75 + 0.5 * drawn
    else:
        return
    weight.copy_(drawn)
