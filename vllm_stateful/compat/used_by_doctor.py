# SPDX-License-Identifier: Apache-2.0
"""What `vllm-stateful doctor` uses of vLLM: its parsers, and an engine core without workers."""

from vllm_stateful.compat.use import Use

_CONFIG = "vllm.config"
_CONNECTORS = "vllm.distributed.kv_transfer.kv_connector"

USES: tuple[Use, ...] = (
    Use("vllm.engine.arg_utils", "doctor", "api", "AsyncEngineArgs"),
    Use(
        "vllm.engine.arg_utils:AsyncEngineArgs",
        "doctor",
        "api",
        "from_cli_args create_engine_config tensor_parallel_size pipeline_parallel_size "
        "data_parallel_size prefill_context_parallel_size decode_context_parallel_size "
        "enable_expert_parallel distributed_executor_backend",
    ),
    Use("vllm.entrypoints.cli.serve", "doctor", "api", "ServeSubcommand"),
    Use("vllm.entrypoints.cli.serve:ServeSubcommand", "doctor", "api", "subparser_init validate"),
    Use("vllm.utils.argparse_utils", "doctor", "api", "FlexibleArgumentParser"),
    Use("vllm.utils.torch_utils", "doctor", "api", "set_default_torch_dtype"),
    Use(_CONFIG, "doctor", "api", "replace set_current_vllm_config"),
    Use(
        f"{_CONFIG}.vllm:VllmConfig",
        "doctor",
        "api",
        "kv_transfer_config kv_events_config ec_transfer_config",
    ),
    Use(f"{_CONFIG}.model:ModelConfig", "doctor", "api", "dtype skip_tokenizer_init"),
    Use(
        f"{_CONFIG}.cache:CacheConfig",
        "doctor",
        "api",
        "enable_prefix_caching prefix_caching_hash_algo",
    ),
    Use(
        f"{_CONFIG}.parallel:ParallelConfig",
        "doctor",
        "api",
        "world_size data_parallel_size prefill_context_parallel_size decode_context_parallel_size",
    ),
    Use(
        f"{_CONFIG}.speculative:SpeculativeConfig",
        "doctor",
        "api",
        "draft_model_config",
    ),
    Use("vllm.compilation.backends", "doctor", "api", "set_model_tag"),
    Use(
        "vllm.distributed.parallel_state",
        "doctor",
        "api",
        "init_distributed_environment ensure_model_parallel_initialized",
    ),
    Use("vllm.model_executor.model_loader.utils", "doctor", "api", "initialize_model"),
    Use(
        "vllm.platforms.interface:Platform",
        "doctor",
        "api",
        "device_name device_type is_cpu is_cuda is_unspecified update_block_size_for_backend",
    ),
    Use("vllm.v1.engine.core", "doctor", "api", "EngineCore"),
    Use("vllm.v1.engine.core:EngineCore", "doctor", "api", "scheduler"),
    Use("vllm.v1.executor", "doctor", "api", "Executor"),
    Use(
        "vllm.v1.executor:Executor",
        "doctor",
        "api",
        "vllm_config check_health",
        overrides="_init_executor get_kv_cache_specs determine_available_memory "
        "initialize_from_config get_supported_kv_cache_layouts set_kv_cache_layout "
        "collective_rpc",
        asked_by="vllm.v1.engine.core vllm.v1.executor.abstract",
    ),
    Use("vllm.v1.kv_cache_interface:KVCacheSpec", "doctor", "api", "max_memory_usage_bytes"),
    Use("vllm.v1.worker.gpu.attn_utils", "doctor", "api", "get_kv_cache_spec"),
    Use("vllm.v1.worker.worker_base", "doctor", "api", "WorkerBase"),
    Use(
        "vllm.v1.worker.worker_base:WorkerBase",
        "doctor",
        "api",
        "get_supported_kv_cache_layouts set_kv_cache_layout",
    ),
    Use(f"{_CONNECTORS}.factory", "doctor", "api", "KVConnectorFactory"),
    Use(
        f"{_CONNECTORS}.v1.multi_connector:MultiConnector",
        "doctor",
        "api",
        "_connectors",
    ),
    Use("vllm.renderers", "doctor", "api", "renderer_from_config"),
    Use("vllm.renderers.chat_utils", "doctor", "api", "load_chat_template"),
    Use("vllm.renderers.hf", "doctor", "api", "resolve_chat_template"),
)
