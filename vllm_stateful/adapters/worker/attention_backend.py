# SPDX-License-Identifier: Apache-2.0
"""vLLM's FlashAttention backend, with our kernels for short new chunks over long caches.

Which kernel serves a step is decided when the step's metadata is built. All other steps run as in
vLLM: the parent class writes to the cache, then runs its kernel. CUDA graphs that contain the
attention are captured with the parent's kernels, and replay those. The exception are graphs of
steps that verify drafts (`_graphs`): they are captured with our kernels, and read the plans of all
such steps from one place in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.config import CUDAGraphMode, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVQuantMode

from vllm_stateful.adapters.attention_choice import STEPS
from vllm_stateful.adapters.worker.batch_prefixes import shared_in
from vllm_stateful.attention import ops
from vllm_stateful.attention.choice import (
    Batch,
    Graphs,
    Layers,
    may_be_captured,
    why_never,
    why_not,
)
from vllm_stateful.attention.same_step import may_read_what_is_written
from vllm_stateful.attention.step_plans import StepPlans

logger = init_logger("vllm.stateful")

_HALVES = (torch.bfloat16, torch.float16)
_FP8 = ("fp8", "fp8_e4m3")
_CACHES = ("auto", "bfloat16", "float16", *_FP8)


@dataclass
class StatefulMetadata(FlashAttentionMetadata):  # type: ignore[misc]
    """The parent's metadata, and the plan if our kernels serve the step.

    Attributes:
        plan: The plan; None if vLLM's own kernel serves the step.
        writes_first: Whether all K and V must be in the cache before any sequence attends.
    """

    plan: ops.DevicePlan | None = None
    writes_first: bool = False


class StatefulMetadataBuilder(FlashAttentionMetadataBuilder):  # type: ignore[misc]
    """Builds the parent's metadata, and a plan if our kernels serve the step."""

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
            is_fp8=kv_cache_spec.kv_quant_mode == KVQuantMode.FP8_PER_TENSOR,
            unusual=self._unusual(config, layer_names),
        )
        self._why_never = why_never(self._layers) or ops.why_unavailable()
        self._is_captured = False
        self._graphs = _graphs(config, self._layers)
        self._are_captured = False
        self._is_v2 = config.use_v2_model_runner
        drafts = config.speculative_config
        self._num_drafts = 0 if drafts is None else drafts.num_speculative_tokens or 0
        self._plans = StepPlans(
            layers=self._layers,
            graphs=self._graphs,
            num_kv_heads=self.num_heads_kv,
            dtype=config.model_config.dtype,
            most_requests=config.scheduler_config.max_num_seqs,
            device=self.device,
        )
        if self._why_never:
            logger.info("stateful: attention is left to vLLM: %s", self._why_never)

    def _unusual(self, config: Any, layer_names: list[str]) -> str:
        """Why our kernels can serve no step of these layers; empty if they can."""
        if self.dcp_world_size > 1:
            return "decode context parallelism"
        if config.model_config.dtype not in _HALVES:
            return f"the model is {config.model_config.dtype}"
        drafts = config.speculative_config
        if drafts is not None and drafts.enable_adaptive_verification:
            return "adaptive verification: only the device knows how many rows a request has"
        return what_all_ask_for(config, layer_names)

    def build_for_cudagraph_capture(self, common: CommonAttentionMetadata) -> Any:
        """Build as the parent does, for a graph that will replay the parent's kernels or ours."""
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
        """Build as the parent does, and make a plan if our kernels serve the step."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata = StatefulMetadata(
            **{each.name: getattr(stock, each.name) for each in fields(FlashAttentionMetadata)}
        )
        batch = _batch(stock, common_attn_metadata)
        reason = self._why_never or why_not(self._layers, self._graphs, batch)
        if not self._is_captured:
            STEPS[reason or "taken"] += 1
        elif not reason and not self._graphs.has_ours(batch.max_query_len):
            reason = "it is captured for any step"
        if not reason:
            new, total = self._lengths(common_attn_metadata)
            shared = shared_in(self, common_attn_metadata)
            metadata.plan = self._plans.of(new, total, batch.max_query_len, shared)
            # A captured graph replays other steps, too, so it must be safe for all of them.
            metadata.writes_first = self._is_captured or self._may_hit(
                common_attn_metadata, new, total
            )
            self._are_captured |= self._is_captured
        elif self._are_captured and self._graphs.has_ours(batch.max_query_len):
            raise RuntimeError(f"a CUDA graph may replay this step, which has no plan: {reason}")
        return metadata

    def _lengths(self, common: CommonAttentionMetadata) -> tuple[Any, Any]:
        """The new tokens of each sequence, and an upper bound of its keys."""
        num_reqs, lengths = common.num_reqs, common.seq_lens_cpu_upper_bound
        assert lengths is not None, "checked in _batch"
        starts = common.query_start_loc_cpu.numpy()
        return starts[1 : num_reqs + 1] - starts[:num_reqs], lengths[:num_reqs].numpy()

    def _may_hit(self, common: CommonAttentionMetadata, new: Any, total: Any) -> bool:
        """Whether a sequence may read what another one writes in this step."""
        # In model runner V1, is_prefilling is false for a request that resumes behind its prompt.
        is_new = None
        if self._is_v2 and common.is_prefilling is not None:
            is_new = common.is_prefilling.numpy()
            # A step that a graph replays is padded with sequences that have no tokens.
            is_new = np.pad(is_new[: len(new)], (0, max(0, len(new) - len(is_new))))
        slack = 2 * self._num_drafts
        return may_read_what_is_written(new, total, self.block_size, may_be_new=is_new, slack=slack)


def _graphs(config: Any, layers: Layers) -> Graphs:
    """The steps that vLLM captures with the attention in the graph.

    Our kernels are captured for steps that verify drafts on model runner V2. There, metadata is
    built for each step from lengths that the host knows, and only the shape of a batch decides
    whether a graph is replayed. The parent's kernels are captured if the drafter is a model (it has
    steps of its own), if only some batches have a mask, with microbatches, and if our kernels could
    take only some of the steps.
    """
    mode = config.compilation_config.cudagraph_mode
    if mode is None or not mode.has_full_cudagraphs():
        return Graphs()
    drafts = config.speculative_config
    model, is_any = config.model_config, mode.mixed_mode() == CUDAGraphMode.FULL
    has_masks = model.is_mm_prefix_lm or model.rswa_window is not None
    longest = 1 + (0 if drafts is None else drafts.num_speculative_tokens or 0)
    return Graphs(
        most_tokens=(config.compilation_config.max_cudagraph_capture_size or 0) if is_any else 0,
        most_query_len=longest,
        are_ours=(
            not (is_any or has_masks or config.parallel_config.use_ubatching)
            and may_be_captured(layers, longest)
            and drafts is not None
            and drafts.method == "ngram_gpu"
            and config.use_v2_model_runner
        ),
    )


def what_all_ask_for(config: Any, layer_names: list[str]) -> str:
    """What all of these layers need that our kernels do not support; empty if nothing.

    Empty also if at least one layer needs nothing of the kind.
    """
    layers = get_layers_from_vllm_config(config, Attention, layer_names).values()
    impls = [impl for layer in layers for impl in layer.impl.get_impl_variants()]
    unknown = [impl.unknown for impl in impls if isinstance(impl, StatefulImpl)]
    return unknown[0] if unknown and all(unknown) else ""


def _batch(stock: FlashAttentionMetadata, common: CommonAttentionMetadata) -> Batch:
    unusual = ""
    if stock.causal is not True:
        unusual = "not causal"
    elif stock.mm_prefix_query_range_tensor is not None or stock.rswa_prefix_lens is not None:
        unusual = "a mask of its own"
    elif common.seq_lens_cpu_upper_bound is None:
        unusual = "lengths that the host does not know"
    return Batch(stock.max_query_len, stock.num_actual_tokens, unusual)


class StatefulImpl(FlashAttentionImpl):  # type: ignore[misc]
    """The attention of one layer. It writes to the cache itself, with either kernel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        left, right = self.sliding_window
        self._window = left + 1 if left >= 0 else 0
        self.unknown = self._what_is_unknown(right)

    def _what_is_unknown(self, window_right: int) -> str:
        """What this layer needs that our kernels do not support; empty if nothing."""
        kind = AttentionType(self.attn_type)
        unknown = {
            f"{kind.value} attention": kind != AttentionType.DECODER,
            "ALiBi": self.alibi_slopes is not None,
            "sinks": self.sinks is not None,
            "KV of another layer": self.kv_sharing_target_layer_name is not None,
            "a window to the right": window_right > 0,
            f"a KV cache in {self.kv_cache_dtype}": self.kv_cache_dtype not in _CACHES,
            "batch invariance": self.batch_invariant_enabled,
        }
        return next((what for what, is_asked in unknown.items() if is_asked), "")

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
        """Write the new K and V to the cache, and attend, with our kernels or the parent's."""
        plan = getattr(attn_metadata, "plan", None)
        cache, scales = kv_cache, None
        if plan is not None and self.kv_cache_dtype in _FP8:
            cache = kv_cache.view(torch.float8_e4m3fn)
            scales = ops.Scales(layer._q_scale, layer._k_scale, layer._v_scale)
        if plan is None or self.unknown or query.dtype != cache.dtype:
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
        if attn_metadata.writes_first:
            self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)
        count = attn_metadata.num_actual_tokens
        ops.delta_append_attention(
            query[:count],
            key[:count],
            value[:count],
            cache,
            output[:count],
            attn_metadata.block_table,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.slot_mapping,
            plan,
            self.scale,
            soft_cap=float(self.logits_soft_cap),
            window=self._window,
            scales=scales,
        )
        return output


class StatefulAttentionBackend(FlashAttentionBackend):  # type: ignore[misc]
    """Replaces FLASH_ATTN, under the same name."""

    forward_includes_kv_cache_update: ClassVar[bool] = True

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return StatefulImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return StatefulMetadataBuilder
