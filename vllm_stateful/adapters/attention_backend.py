# SPDX-License-Identifier: Apache-2.0
"""vLLM's FlashAttention backend with our kernels for short new chunks over long caches.

Everything is decided when a step's metadata is built. What is not taken runs as before: the
parent's kernel behind the parent's write to the cache. Full CUDA graphs are captured with the
parent's kernels and so replay these; batches of more than one new token run between the graphs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from vllm_stateful.adapters.attention_choice import STEPS
from vllm_stateful.attention import ops
from vllm_stateful.attention.choice import Batch, Layers, tile_rows, why_never, why_not
from vllm_stateful.attention.plan import Shape, make_plan
from vllm_stateful.attention.workspace import Workspace

logger = init_logger("vllm.stateful")

_HALVES = (torch.bfloat16, torch.float16)


@dataclass
class StatefulMetadata(FlashAttentionMetadata):  # type: ignore[misc]
    """The parent's, and the plan where our kernels serve the step.

    Attributes:
        plan: None: vLLM's own kernel serves it.
    """

    plan: ops.DevicePlan | None = None


class StatefulMetadataBuilder(FlashAttentionMetadataBuilder):  # type: ignore[misc]
    """Builds the parent's metadata, and a plan beside it."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], config: Any, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, config, device)
        self._layers = Layers(
            head_size=self.headdim,
            group_size=self.num_heads_q // self.num_heads_kv,
            page_size=self.block_size,
            is_half_precision=self.kv_cache_dtype in _HALVES,
            capability=torch.cuda.get_device_capability(device),
            unusual=self._unusual(config),
        )
        self._why_never = why_never(self._layers) or ops.why_unavailable()
        self._workspace = Workspace(self.headdim, device)
        self._is_captured = False
        if self._why_never:
            logger.info("stateful: attention is left to vLLM: %s", self._why_never)

    def _unusual(self, config: Any) -> str:
        """Why no plan can be made; empty when one can."""
        if self.dcp_world_size > 1:
            return "decode context parallelism"
        drafts = config.speculative_config
        if drafts is not None and drafts.enable_adaptive_verification:
            return "adaptive verification: only the device knows how many rows a request has"
        return ""

    def build_for_cudagraph_capture(self, common: CommonAttentionMetadata) -> Any:
        """The parent's kernels are what a graph replays."""
        self._is_captured = True
        try:
            return super().build_for_cudagraph_capture(common)
        finally:
            self._is_captured = False

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> StatefulMetadata:
        """As the parent's."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata = StatefulMetadata(
            **{each.name: getattr(stock, each.name) for each in fields(FlashAttentionMetadata)}
        )
        if self._is_captured:
            return metadata
        reason = self._why_never or why_not(_batch(stock, common_attn_metadata))
        STEPS[reason or "taken"] += 1
        if not reason:
            metadata.plan = self._plan(stock, common_attn_metadata)
        return metadata

    def _plan(self, stock: FlashAttentionMetadata, common: CommonAttentionMetadata) -> Any:
        num_reqs, rows = common.num_reqs, tile_rows(self._layers, stock.max_query_len)
        starts = common.query_start_loc_cpu[: num_reqs + 1].numpy()
        lengths = common.seq_lens_cpu_upper_bound
        assert lengths is not None, "checked in _batch"
        device = self.device.index or 0
        shape = Shape(
            num_ctas=ops.num_ctas(self.kv_cache_dtype, self.headdim, rows, device),
            tile_rows=rows,
            block_keys=ops.block_keys(self.headdim, rows),
            num_kv_heads=self.num_heads_kv,
            group_size=self._layers.group_size,
        )
        # A group's layers may differ in their windows: the plan covers all keys, the kernels mask.
        plan = make_plan(starts[1:] - starts[:-1], lengths[:num_reqs].numpy(), shape, exact=False)
        return self._workspace.upload(plan, rows)


def _batch(stock: FlashAttentionMetadata, common: CommonAttentionMetadata) -> Batch:
    unusual = ""
    if stock.causal is not True:
        unusual = "not causal"
    elif stock.mm_prefix_query_range_tensor is not None or stock.rswa_prefix_lens is not None:
        unusual = "a mask of its own"
    elif common.seq_lens_cpu_upper_bound is None:
        unusual = "lengths that the host does not know"
    return Batch(stock.max_query_len, unusual)


class StatefulImpl(FlashAttentionImpl):  # type: ignore[misc]
    """One layer. Appends to the cache by itself, in either path."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        left, right = self.sliding_window
        self._window = left + 1 if left >= 0 else 0
        self._is_plain = (
            self.attn_type == AttentionType.DECODER
            and self.alibi_slopes is None
            and self.sinks is None
            and self.kv_sharing_target_layer_name is None
            and right <= 0
            and self.kv_cache_dtype == "auto"
            and not self.batch_invariant_enabled
        )

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the parent's, and writes the new K and V."""
        plan = getattr(attn_metadata, "plan", None)
        if plan is None or not self._is_plain or query.dtype != kv_cache.dtype:
            if attn_metadata is not None and self.kv_sharing_target_layer_name is None:
                self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)
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
        ops.delta_append_attention(
            query[:count],
            key[:count],
            value[:count],
            kv_cache,
            output[:count],
            attn_metadata.block_table,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.slot_mapping,
            plan,
            self.scale,
            soft_cap=float(self.logits_soft_cap),
            window=self._window,
        )
        return output


class StatefulAttentionBackend(FlashAttentionBackend):  # type: ignore[misc]
    """Stands in the place of FLASH_ATTN, under its name."""

    forward_includes_kv_cache_update: ClassVar[bool] = True

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return StatefulImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return StatefulMetadataBuilder
