# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU attention backend, with our kernel for decoding, drafts and short turns.

Which kernel serves a step is decided when the step's metadata is built. All other steps run as in
vLLM. vLLM writes its own cache in both cases, so either kernel may follow the other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_stateful.adapters.attention_choice import STEPS
from vllm_stateful.attention import cpu_ops

logger = init_logger("vllm.stateful")

_LAYOUTS = ("vec", "vec16")
"""vLLM's names of the kernels whose cache layout our kernel can read."""


@dataclass
class StatefulCPUMetadata(CPUAttentionMetadata):  # type: ignore[misc]
    """The parent's metadata, and whether our kernel serves the step.

    Attributes:
        is_taken: whether our kernel serves the step.
    """

    is_taken: bool = False


class StatefulCPUMetadataBuilder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """Builds the parent's metadata, and decides whether our kernel serves the step."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], config: Any, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, config, device)
        self._why_never = self._unusual() or cpu_ops.why_unavailable()
        if self._why_never:
            logger.info("stateful: attention is left to vLLM: %s", self._why_never)

    def _unusual(self) -> str:
        """Why our kernel can serve no step of these layers; empty if it can."""
        if self.is_cross_attention or self.is_encoder_only_attention:
            return "not a decoder's attention"
        if self.isa not in _LAYOUTS:
            return f"the cache is laid out for {self.isa}"
        if self.dtype not in cpu_ops.DTYPES or self.kv_cache_dtype != "auto":
            return "the KV cache is neither float32 nor bfloat16"
        if self.head_dim % cpu_ops.MULTIPLE or self.block_size % cpu_ops.MULTIPLE:
            return f"head size {self.head_dim}, blocks of {self.block_size} tokens"
        return ""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> StatefulCPUMetadata:
        """Build as the parent does, and decide which kernel serves the step."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        reason = self._why_never or _why_not(stock)
        STEPS[reason or "taken"] += 1
        known = {each.name: getattr(stock, each.name) for each in fields(CPUAttentionMetadata)}
        return StatefulCPUMetadata(**known, is_taken=not reason)


def _why_not(step: CPUAttentionMetadata) -> str:
    """Why this step is left to vLLM; empty if our kernel serves it."""
    if step.causal is not True or step.dynamic_causal is not None:
        return "not causal"
    if step.max_query_len > cpu_ops.MOST_NEW_TOKENS:
        return "prefill"
    return ""


class StatefulCPUImpl(CPUAttentionBackendImpl):  # type: ignore[misc]
    """The attention of one layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_plain = (
            self.attn_type == AttentionType.DECODER
            and self.alibi_slopes is None
            and self.sinks is None
            and not self.is_fp8_kv_cache
        )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend with our kernel or the parent's."""
        is_ours = self._is_plain and getattr(attn_metadata, "is_taken", False)
        if not is_ours or not _fits(query, kv_cache) or output_scale is not None:
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        count = attn_metadata.num_actual_tokens
        cpu_ops.chunk_attention(
            query[:count],
            kv_cache,
            output[:count],
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            self.scale,
            soft_cap=float(self.logits_soft_cap),
            window=max(0, self.sliding_window),
        )
        return output


def _fits(query: torch.Tensor, kv_cache: torch.Tensor) -> bool:
    """Whether each block of a KV head is contiguous in memory, with the query's dtype."""
    width = kv_cache.size(3)
    return bool(query.dtype == kv_cache.dtype and kv_cache.stride()[2:] == (width, 1))


class StatefulCPUBackend(CPUAttentionBackend):  # type: ignore[misc]
    """Replaces CPU_ATTN, under the same name."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return StatefulCPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return StatefulCPUMetadataBuilder
