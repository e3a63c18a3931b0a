# SPDX-License-Identifier: Apache-2.0
"""Lists what an API server uses of vLLM, and what both ends of the transport use."""

from vllm_stateful.compat.use import Use

_ENGINE = "vllm.v1.engine"

_TRANSPORT = (
    Use(
        f"{_ENGINE}:EngineCoreRequest",
        "sessions",
        "all",
        "request_id prompt_token_ids kv_hints sampling_params pooling_params resumable "
        "cache_salt lora_request session_id client_index data_parallel_rank external_req_id "
        "prompt_is_token_ids reasoning_ended reasoning_parser_kwargs abort_immediately "
        "mm_features prompt_embeds",
    ),
    Use(f"{_ENGINE}:EngineCoreRequestType", "transport", "all", "ADD ABORT"),
    Use(
        f"{_ENGINE}:EngineCoreOutput",
        "transport",
        "all",
        "request_id finish_reason stop_reason kv_transfer_params new_token_ids events",
    ),
    Use(f"{_ENGINE}:EngineCoreOutputs", "transport", "all", "outputs engine_index"),
    Use(f"{_ENGINE}:FinishReason", "transport", "all", "STOP LENGTH ABORT ERROR"),
    Use(
        f"{_ENGINE}.core:EngineCoreProc",
        "transport",
        "engine",
        "output_queue engine_index vllm_config scheduler request_block_hasher",
    ),
    Use(
        f"{_ENGINE}.core_client:MPClient",
        "transport",
        "api",
        "core_engines core_engine vllm_config",
    ),
    Use(
        f"{_ENGINE}.core_client:AsyncMPClient",
        "transport",
        "api",
        "client_count client_index outputs_queue _call_utility_async call_utility_all_async "
        "add_request_async",
    ),
)

_AFFINITY = (
    Use(
        f"{_ENGINE}.core_client:DPLBAsyncMPClient",
        "transport",
        "api",
        "lb_engines engine_inflight reqs_in_flight",
    ),
)

_RESPONSES = (
    Use(
        f"{_ENGINE}.output_processor:OutputProcessorOutput",
        "responses",
        "api",
        "request_outputs reqs_to_abort",
    ),
    Use(
        f"{_ENGINE}:EngineCoreOutput",
        "responses",
        "api",
        "new_logprobs new_prompt_logprobs_tensors new_sampling_mask routed_experts prefill_stats "
        "ec_transfer_params",
    ),
    Use(f"{_ENGINE}:EngineCoreEvent", "responses", "api", "new_event"),
    Use(f"{_ENGINE}:EngineCoreEventType", "responses", "api", "QUEUED SCHEDULED"),
    Use("vllm.v1.metrics.stats", "responses", "api", "PrefillStats"),
    Use("vllm.sampling_params:SamplingParams", "responses", "api", "prompt_logprob_token_ids"),
)

_API = (
    Use(
        "vllm.renderers.hf:HfRenderer",
        "renderer",
        "api",
        "tokenizer model_config _executor _resources _apply_chat_template_async "
        "_build_tokens_prompt _wants_offsets _tokenize_prompt_async",
        overrides="render_chat_async render_cmpl_async _tokenize_prompt _process_tokens "
        "_process_tokens_async validate_token_ids",
        asked_by="vllm.renderers.base vllm.renderers.hf vllm.renderers.online_renderer",
    ),
    Use("vllm.renderers.hf", "renderer", "api", "resolve_chat_template safe_apply_chat_template"),
    Use(
        "vllm.renderers.params:TokenizeParams",
        "renderer",
        "api",
        "max_total_tokens max_output_tokens add_special_tokens truncate_prompt_tokens "
        "pad_prompt_tokens do_lower_case max_input_tokens",
    ),
    Use("vllm.renderers.registry", "renderer", "api", "RENDERER_REGISTRY"),
    Use("vllm.renderers.registry:RendererRegistry", "renderer", "api", "renderers register"),
    Use("vllm.inputs", "renderer", "api", "TextPrompt TokensPrompt"),
    Use(f"{_ENGINE}.async_llm:AsyncLLM", "endpoint", "api", "engine_core errored renderer"),
    Use(f"{_ENGINE}.async_llm:AsyncLLM", "tracing", "api", "is_tracing_enabled"),
    Use("vllm.tracing", "tracing", "api", "extract_trace_context instrument_manual"),
    Use("vllm.config.model:ModelConfig", "endpoint", "api", "is_multimodal_model"),
    Use(
        "vllm.entrypoints.openai.responses.protocol:ResponsesRequest",
        "sessions",
        "api",
        "previous_response_id",
    ),
    Use(
        "vllm.reasoning.basic_parsers:BaseThinkingReasoningParser",
        "reasoning",
        "api",
        "start_token_id end_token_id",
    ),
    Use(
        "vllm.tool_parsers.abstract_tool_parser:ToolParser",
        "sessions",
        "api",
        "supports_required_and_named",
    ),
    Use("vllm.utils.async_utils", "renderer", "api", "make_async"),
    Use(
        f"{_ENGINE}.input_processor:InputProcessor",
        "sessions",
        "api",
        "speculative_config vllm_config",
    ),
    Use(
        "vllm.entrypoints.openai.chat_completion.protocol",
        "requests",
        "api",
        "ChatCompletionRequest",
    ),
    Use("vllm.entrypoints.serve.engine.protocol", "endpoint", "api", "ErrorInfo ErrorResponse"),
    Use(
        "vllm.entrypoints.anthropic.protocol",
        "anthropic-usage",
        "api",
        "AnthropicMessagesResponse AnthropicUsage",
    ),
    Use(
        f"{_ENGINE}.output_processor:RequestState",
        "tool-call-check",
        "api",
        "detokenizer external_req_id prompt_token_ids request_id",
        overrides="make_request_output",
        asked_by=f"{_ENGINE}.output_processor:OutputProcessor",
    ),
    Use(
        f"{_ENGINE}.detokenizer:BaseIncrementalDetokenizer",
        "tool-call-check",
        "api",
        "output_text output_token_ids",
    ),
    Use(
        "vllm.parser.abstract_parser:DelegatingParser",
        "sessions",
        "api",
        "reasoning_parser_cls tool_parser_cls",
    ),
)

_COMMAND_LINE = (
    Use("vllm.engine.arg_utils", "cli", "api", "EngineArgs"),
    Use(
        "vllm.engine.arg_utils:EngineArgs",
        "cli",
        "api",
        "from_cli_args create_model_config model tokenizer revision trust_remote_code hf_token "
        "async_scheduling enable_lora enable_prefix_caching pipeline_parallel_size "
        "watermark_config structured_outputs_config",
    ),
    Use("vllm.transformers_utils.config", "cli", "api", "maybe_override_with_speculators"),
    Use("vllm.platforms.interface", "cli", "api", "CpuArchEnum"),
    Use("vllm.platforms.interface:CpuArchEnum", "cli", "api", "X86"),
    Use("vllm.platforms.interface:Platform", "cli", "api", "get_cpu_architecture"),
    Use("vllm.transformers_utils.utils", "cli", "api", "is_cloud_storage"),
    Use(
        "vllm.config.model:ModelConfig",
        "cli",
        "api",
        "runner_type is_encoder_decoder is_diffusion has_inner_state enable_prompt_embeds "
        "logits_processors enable_trace_replay",
    ),
)

USES: tuple[Use, ...] = (*_TRANSPORT, *_AFFINITY, *_RESPONSES, *_API, *_COMMAND_LINE)
