# SPDX-License-Identifier: Apache-2.0
"""Lists what the workers use of vLLM: tables on the device, drafts, attention."""

from vllm_stateful.compat.use import Use

_SPECS = "vllm.v1.kv_cache_interface"
_ATTENTION = "vllm.v1.attention"
_FLASH = f"{_ATTENTION}.backends.flash_attn"
_CPU = f"{_ATTENTION}.backends.cpu_attn"
_CONFIG = "vllm.config"

_WORKER = (
    Use("vllm.utils.torch_utils", "worker-ids", "all", "async_tensor_h2d"),
    Use("vllm.v1.worker.gpu.buffer_utils:StagedWriteTensor", "worker-ids", "worker", "gpu"),
    Use(
        "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator",
        "device-drafts",
        "worker",
        overrides="init_cudagraph_manager capture propose",
        asked_by="vllm.v1.worker.gpu.model_runner:GPUModelRunner",
    ),
    Use(
        "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator",
        "device-drafts",
        "worker",
        "observe_verification acceptance_estimator draft_token_confidence_probs",
    ),
    Use(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        "device-drafts",
        "worker",
        "speculator rejection_sampler device",
    ),
    Use(
        "vllm.v1.spec_decode.metadata:SpecDecodeMetadata",
        "engine-drafts",
        "worker",
        "num_draft_tokens",
    ),
    Use(
        "vllm.v1.worker.gpu.sample.output:SamplerOutput",
        "device-drafts",
        "worker",
        "sampled_token_ids num_sampled num_rejected sampling_mask_tensors",
    ),
    Use(
        "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler",
        "device-drafts",
        "worker",
        overrides="__call__",
    ),
    Use(
        "vllm.v1.worker.gpu.input_batch:InputBatch",
        "device-drafts",
        "worker",
        "req_ids idx_mapping idx_mapping_np num_reqs",
    ),
    Use(
        "vllm.v1.worker.gpu.states:RequestState",
        "device-drafts",
        "worker",
        "req_id_to_index all_token_ids total_len max_num_reqs max_model_len",
    ),
)

_CUDA_KERNELS = (
    Use(
        f"{_ATTENTION}.backends.registry",
        "attention-cuda",
        "worker",
        "AttentionBackendEnum register_backend",
    ),
    Use(
        f"{_ATTENTION}.backends.registry:AttentionBackendEnum",
        "attention-cuda",
        "worker",
        "FLASH_ATTN CPU_ATTN get_path is_overridden clear_override",
    ),
    Use(
        f"{_ATTENTION}.backend:CommonAttentionMetadata",
        "attention-cuda",
        "worker",
        "query_start_loc query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound num_reqs "
        "num_actual_tokens max_query_len max_seq_len block_table_tensor slot_mapping causal "
        "is_prefilling",
    ),
    Use(f"{_ATTENTION}.backend:AttentionType", "attention-cuda", "worker", "DECODER"),
    Use(
        f"{_FLASH}:FlashAttentionMetadataBuilder",
        "attention-cuda",
        "worker",
        "headdim num_heads_q num_heads_kv kv_cache_dtype block_size",
        overrides="build build_for_cudagraph_capture",
        asked_by="vllm.v1.worker.utils",
    ),
    Use(
        f"{_FLASH}:FlashAttentionImpl",
        "attention-cuda",
        "worker",
        "alibi_slopes attn_type kv_cache_dtype kv_sharing_target_layer_name logits_soft_cap "
        "sinks sliding_window do_kv_cache_update batch_invariant_enabled get_impl_variants",
        overrides="forward",
        asked_by="vllm.model_executor.layers.attention.attention",
    ),
    Use(
        f"{_FLASH}:FlashAttentionBackend",
        "attention-cuda",
        "worker",
        overrides="get_impl_cls get_builder_cls",
        asked_by="vllm.model_executor.layers.attention.attention vllm.v1.worker.utils",
    ),
    Use(_FLASH, "attention-cuda", "worker", "FlashAttentionMetadata"),
    Use(
        f"{_FLASH}:FlashAttentionMetadata",
        "attention-cuda",
        "worker",
        "mm_prefix_query_range_tensor rswa_prefix_lens",
    ),
    Use(_CONFIG, "attention-cuda", "worker", "CUDAGraphMode get_layers_from_vllm_config"),
    Use(
        f"{_CONFIG}:CUDAGraphMode",
        "attention-cuda",
        "worker",
        "has_full_cudagraphs mixed_mode",
    ),
    Use(
        f"{_CONFIG}.compilation:CompilationConfig",
        "attention-cuda",
        "worker",
        "cudagraph_mode max_cudagraph_capture_size",
    ),
    Use(f"{_CONFIG}.scheduler:SchedulerConfig", "attention-cuda", "worker", "max_num_seqs"),
    Use(f"{_CONFIG}.parallel:ParallelConfig", "attention-cuda", "worker", "use_ubatching"),
    Use(
        f"{_CONFIG}.model:ModelConfig",
        "attention-cuda",
        "worker",
        "is_mm_prefix_lm rswa_window",
    ),
    Use("vllm.model_executor.layers.attention", "attention-cuda", "worker", "Attention"),
    Use(
        "vllm.model_executor.layers.attention:Attention",
        "attention-cuda",
        "worker",
        "impl",
    ),
    Use(_SPECS, "attention-cuda", "worker", "KVQuantMode"),
    Use(f"{_SPECS}:KVQuantMode", "attention-cuda", "worker", "FP8_PER_TENSOR"),
    Use(f"{_SPECS}:FullAttentionSpec", "attention-cuda", "worker", "kv_quant_mode"),
)

_CPU_KERNELS = (
    Use(
        f"{_ATTENTION}.backends.registry",
        "attention-cpu",
        "worker",
        "AttentionBackendEnum register_backend",
    ),
    Use(
        f"{_ATTENTION}.backends.registry:AttentionBackendEnum",
        "attention-cpu",
        "worker",
        "FLASH_ATTN CPU_ATTN get_path is_overridden clear_override",
    ),
    Use(
        f"{_ATTENTION}.backend:CommonAttentionMetadata",
        "attention-cpu",
        "worker",
        "query_start_loc query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound num_reqs "
        "num_actual_tokens max_query_len max_seq_len block_table_tensor slot_mapping causal "
        "is_prefilling",
    ),
    Use(f"{_ATTENTION}.backend:AttentionType", "attention-cpu", "worker", "DECODER"),
    Use(
        f"{_CPU}:CPUAttentionMetadataBuilder",
        "attention-cpu",
        "worker",
        "head_dim isa block_size num_heads is_cross_attention is_encoder_only_attention",
        overrides="build",
        asked_by="vllm.v1.worker.utils",
    ),
    Use(
        f"{_CPU}:CPUAttentionBackendImpl",
        "attention-cpu",
        "worker",
        "alibi_slopes attn_type logits_soft_cap sinks sliding_window is_fp8_kv_cache",
        overrides="forward",
        asked_by="vllm.model_executor.layers.attention.attention",
    ),
    Use(_CPU, "attention-cpu", "worker", "CPUAttentionMetadata CPUAttentionBackend"),
    Use(f"{_CPU}:CPUAttentionMetadata", "attention-cpu", "worker", "causal dynamic_causal"),
    Use(
        f"{_CPU}:CPUAttentionBackend",
        "attention-cpu",
        "worker",
        overrides="get_impl_cls get_builder_cls",
        asked_by="vllm.model_executor.layers.attention.attention vllm.v1.worker.utils",
    ),
)

USES: tuple[Use, ...] = (*_WORKER, *_CUDA_KERNELS, *_CPU_KERNELS)
