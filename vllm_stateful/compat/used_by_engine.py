# SPDX-License-Identifier: Apache-2.0
"""Lists what the engine core uses of vLLM: requests, the scheduler, blocks, the offload tier."""

from vllm_stateful.compat.use import Use

_CORE = "vllm.v1.core"
_SCHED = f"{_CORE}.sched"
_KV = f"{_CORE}.kv_cache_manager"
_MANAGERS = f"{_CORE}.single_type_kv_cache_manager"
_SPECS = "vllm.v1.kv_cache_interface"
_POLICIES = "vllm.v1.kv_offload.cpu.policies.base"
_V1 = "vllm.distributed.kv_transfer.kv_connector.v1"
_OFFLOADING = f"{_V1}.offloading.scheduler"
_FS = "vllm.v1.kv_offload.tiering.fs"
_CONFIG = "vllm.config"

_SETTINGS = (
    Use(
        f"{_CONFIG}.vllm:VllmConfig",
        "sessions",
        "all",
        "model_config cache_config parallel_config scheduler_config speculative_config "
        "compilation_config use_v2_model_runner",
    ),
    Use(
        f"{_CONFIG}.model:ModelConfig",
        "sessions",
        "all",
        "architectures get_vocab_size logits_processors max_model_len hf_config "
        "try_get_generation_config",
    ),
    Use(
        f"{_CONFIG}.cache:CacheConfig",
        "sessions",
        "all",
        "block_size prefix_caching_hash_algo use_replayssm",
    ),
    Use(
        f"{_CONFIG}.parallel:ParallelConfig",
        "sessions",
        "all",
        "distributed_executor_backend nnodes pipeline_parallel_size",
    ),
    Use(
        f"{_CONFIG}.speculative:SpeculativeConfig",
        "sessions",
        "all",
        "method num_speculative_tokens draft_sample_method rejection_sample_method",
    ),
    Use(f"{_CONFIG}.scheduler:SchedulerConfig", "sessions", "all", "async_scheduling"),
    Use(
        "vllm.multimodal.inputs:MultiModalFeatureSpec",
        "sessions",
        "all",
        "identifier mm_position modality",
    ),
    Use("vllm.multimodal.inputs:PlaceholderRange", "sessions", "engine", "offset length"),
    Use(
        f"{_CONFIG}.compilation:CompilationConfig",
        "shared-prefixes",
        "worker",
        "static_forward_context",
    ),
    Use(
        f"{_SPECS}:KVCacheGroupSpec",
        "shared-prefixes",
        "worker",
        "layer_names kv_cache_spec",
    ),
)

_TRACING = (
    Use("vllm.v1.request:Request", "tracing", "engine", "trace_headers"),
    Use(f"{_CONFIG}.vllm:VllmConfig", "tracing", "engine", "observability_config"),
    Use(
        f"{_CONFIG}.observability:ObservabilityConfig",
        "tracing",
        "engine",
        "otlp_traces_endpoint",
    ),
)

_REQUESTS = (
    Use(
        "vllm.v1.request:Request",
        "sessions",
        "all",
        "request_id prompt_token_ids num_prompt_tokens num_tokens num_output_tokens "
        "output_token_ids all_token_ids num_computed_tokens num_output_placeholders "
        "num_preemptions block_hashes cache_salt lora_request session_id kv_hints mm_features "
        "sampling_params pooling_params prompt_embeds resumable skip_reading_prefix_cache status "
        "num_in_flight_tokens arrival_time spec_token_ids kv_cache_report_mode is_finished "
        "is_prefill_chunk priority get_finished_reason",
    ),
    Use(
        "vllm.v1.request:RequestStatus",
        "sessions",
        "all",
        "WAITING WAITING_FOR_REMOTE_KVS FINISHED_ERROR RUNNING",
    ),
    Use(
        "vllm.sampling_params:SamplingParams",
        "sessions",
        "all",
        "prompt_logprobs logprobs extra_args sampling_type thinking_token_budget max_tokens "
        "min_tokens skip_special_tokens output_kind min_p logit_bias logprob_token_ids",
    ),
    Use("vllm.sampling_params:SamplingType", "sessions", "all", "GREEDY RANDOM"),
    Use(
        "vllm.v1.kv_hints:KvHintsEnvelope",
        "sessions",
        "all",
        "actions message_id protocol_version",
    ),
    Use("vllm.v1.kv_hints:KvHintAction", "sessions", "all", "action_type payload"),
)

_SCHEDULER = (
    Use(
        f"{_SCHED}.scheduler:Scheduler",
        "sessions",
        "engine",
        "kv_cache_manager structured_output_manager requests policy waiting running "
        "vllm_config cache_config connector hash_block_size num_spec_tokens use_eagle "
        "num_prefill_lookahead sched_step_seq processed_step_seq deferred_frees "
        "_request_blocks_can_be_freed prefix_replay_tokens aux_output_connector dcp_world_size "
        "pcp_world_size num_sampled_tokens_per_step _inflight_prefills",
        overrides="schedule update_from_output update_draft_token_ids add_request _free_request "
        "_free_request_blocks _drain_deferred_frees _handle_blocked_waiting_request "
        "_mamba_block_aligned_split make_spec_decoding_stats _update_request_with_output",
        asked_by=f"{_SCHED}.scheduler:Scheduler vllm.v1.engine.core:EngineCore",
    ),
    Use(
        "vllm.v1.attention.backends.registry",
        "sessions",
        "engine",
        "AttentionBackendEnum register_backend",
    ),
    Use(f"{_SCHED}.async_scheduler", "sessions", "engine", "AsyncScheduler"),
    Use(f"{_SCHED}.request_queue:SchedulingPolicy", "sessions", "engine", "FCFS"),
    Use(
        f"{_SCHED}.request_queue:RequestQueue",
        "sessions",
        "engine",
        "remove_request",
        overrides="add_request pop_request peek_request prepend_request prepend_requests "
        "remove_requests",
        asked_by=f"{_SCHED}.scheduler:Scheduler",
    ),
    Use(
        f"{_SCHED}.output:SchedulerOutput",
        "sessions",
        "engine",
        "scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens total_num_scheduled_tokens "
        "scheduled_spec_decode_tokens num_spec_tokens_to_schedule",
    ),
    Use(
        f"{_SCHED}.output:NewRequestData",
        "sessions",
        "engine",
        "req_id num_computed_tokens prefill_token_ids",
    ),
    Use(f"{_SCHED}.output:CachedRequestData", "sessions", "engine", "req_ids resumed_req_ids"),
    Use("vllm.v1.outputs:DraftTokenIds", "sessions", "engine", "req_ids draft_token_ids"),
    Use("vllm.v1.outputs:ModelRunnerOutput", "sessions", "engine", "kv_connector_output"),
    Use("vllm.v1.outputs:KVConnectorOutput", "sessions", "engine", "invalid_block_ids"),
)

_CONNECTORS = (
    Use(
        f"{_V1}.base:KVConnectorBase_V1",
        "sessions",
        "engine",
        "get_num_new_matched_tokens _kv_transfer_config",
    ),
    Use(f"{_V1}.multi_connector:MultiConnector", "sessions", "engine", "sub_connectors"),
    Use(
        f"{_CONFIG}.kv_transfer:KVTransferConfig",
        "sessions",
        "engine",
        "kv_role get_from_extra_config",
    ),
)

_BLOCKS = (
    Use(
        f"{_KV}:KVCacheManager",
        "sessions",
        "engine",
        "coordinator block_pool enable_caching enable_kv_cache_events empty_kv_cache_blocks "
        "max_model_len cache_blocks truncate_computed_blocks",
        overrides="get_computed_blocks allocate_slots free reset_prefix_cache new_step_starts "
        "usage estimate_cached_tokens",
        asked_by=f"{_SCHED}.scheduler:Scheduler",
    ),
    Use(f"{_KV}:KVCacheBlocks", "sessions", "all", "blocks"),
    Use(
        f"{_CORE}.kv_cache_coordinator:KVCacheCoordinator",
        "sessions",
        "engine",
        "single_type_managers block_pool get_num_blocks_to_allocate get_num_cacheable_tokens "
        "emit_cached_block_events",
    ),
    Use(
        f"{_CORE}.block_pool:BlockPool",
        "sessions",
        "engine",
        "num_gpu_blocks blocks null_block hash_block_size get_num_free_blocks get_new_blocks touch "
        "free_blocks get_cached_block",
    ),
    Use(
        f"{_CORE}.kv_cache_utils:KVCacheBlock",
        "sessions",
        "engine",
        "block_id ref_cnt is_null block_hash block_hash_num_tokens",
    ),
    Use(
        f"{_CORE}.kv_cache_utils",
        "sessions",
        "all",
        "get_request_block_hasher make_block_hash_with_group_id resolve_block_hashes "
        "generate_block_hash_extra_keys",
    ),
    Use(
        f"{_MANAGERS}:SingleTypeKVCacheManager",
        "sessions",
        "engine",
        "block_size block_pool kv_cache_spec req_to_blocks num_cached_block pop_blocks_for_free "
        "_pending_cow_copies",
    ),
    Use(
        f"{_MANAGERS}:SlidingWindowManager",
        "sessions",
        "engine",
        "sliding_window extra_retained_tokens",
    ),
    Use(
        f"{_MANAGERS}:ChunkedLocalAttentionManager",
        "sessions",
        "engine",
        "attention_chunk_size",
    ),
    Use(
        f"{_MANAGERS}:MambaManager",
        "sessions",
        "engine",
        "mamba_cache_mode has_prefill_checkpoint_blocks",
    ),
    Use(_MANAGERS, "sessions", "engine", "FullAttentionManager"),
    Use(
        _SPECS,
        "sessions",
        "engine",
        "FullAttentionSpec SlidingWindowSpec ChunkedLocalAttentionSpec MambaSpec MLAAttentionSpec "
        "SlidingWindowMLASpec",
    ),
    Use(f"{_SPECS}:FullAttentionSpec", "sessions", "engine", "tokens_per_state non_causal"),
    Use("vllm.utils.hashing", "sessions", "engine", "get_hash_fn_by_name"),
)

_OFFLOAD = (
    Use(
        _POLICIES + ":CachePolicy",
        "offload",
        "engine",
        "cache_capacity",
        overrides="get insert remove touch on_request_finished evict clear mark_evictable "
        "mark_non_evictable",
        asked_by="vllm.v1.kv_offload.cpu.manager:CPUOffloadingManager",
    ),
    Use(_POLICIES, "offload", "engine", "order_request_keys ChunkStatus"),
    Use(f"{_OFFLOADING}:SchedulerOffloadConfig", "offload", "engine", "kv_group_configs"),
    Use(
        f"{_OFFLOADING}:GroupOffloadConfig",
        "offload",
        "engine",
        "tokens_per_chunk sliding_window_size_in_chunks",
    ),
    Use("vllm.v1.kv_offload.base", "offload", "engine", "OffloadKey"),
    Use("vllm.v1.kv_offload.base:ReqContext", "offload", "engine", "req_id kv_transfer_params"),
    Use(
        f"{_V1}.offloading_connector",
        "offload",
        "engine",
        "OffloadingConnector",
    ),
)

_FILES = (
    Use(f"{_FS}.manager", "offload", "engine", "FileSystemTierManager"),
    Use(
        f"{_FS}.manager:FileSystemTierManager",
        "offload",
        "engine",
        "block_size_bytes file_mapper",
        overrides="__init__",
        asked_by="vllm.v1.kv_offload.tiering.factory",
    ),
    Use(
        f"{_CONFIG}.vllm:VllmConfig",
        "offload",
        "engine",
        "attention_config cache_config load_config model_config speculative_config",
    ),
    Use(
        f"{_CONFIG}.model:ModelConfig",
        "offload",
        "engine",
        "model revision dtype max_model_len quantization quantization_config seed hf_config",
    ),
    Use(f"{_CONFIG}.speculative:SpeculativeConfig", "offload", "engine", "draft_model_config"),
    Use(
        f"{_CONFIG}.cache:CacheConfig",
        "offload",
        "engine",
        "cache_dtype kv_cache_dtype_skip_layers kv_cache_layout kv_sharing_fast_prefill "
        "mamba_cache_dtype mamba_cache_mode mamba_ssm_cache_dtype replayssm_buffer_len "
        "sliding_window swa_bounded_replay use_replayssm",
    ),
    Use("vllm.v1.kv_offload.file_mapper:FileMapper", "offload", "engine", "base_path rank"),
    Use(f"{_CONFIG}.load:LoadConfig", "offload", "engine", "load_format download_dir"),
    Use(
        "vllm.platforms.interface:Platform",
        "offload",
        "engine",
        "device_name get_device_capability",
    ),
)

USES: tuple[Use, ...] = (
    *_SETTINGS,
    *_TRACING,
    *_REQUESTS,
    *_SCHEDULER,
    *_CONNECTORS,
    *_BLOCKS,
    *_OFFLOAD,
    *_FILES,
)
