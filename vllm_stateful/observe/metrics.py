# SPDX-License-Identifier: Apache-2.0
"""The table of all metrics: names, units, labels, and where each value comes from."""

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """One Prometheus metric and the entry of the snapshot that feeds it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    key: str
    label: str | None
    help: str
    process: Literal["engine", "api"] = "engine"
    """Where the value is read: in the engine core, or in each API server."""


OFF = "off"
"""The snapshot key under which an engine core says why the plugin is off there."""

METRICS: tuple[Metric, ...] = (
    Metric(
        "vllm_stateful_engines_off",
        "gauge",
        OFF,
        "reason",
        "Engine cores that serve as stock vLLM, by reason.",
    ),
    Metric(
        "vllm_stateful_turns",
        "counter",
        "turns",
        "outcome",
        "Turns by how they found their context: resumed, forked, diverged, restored (from vLLM's "
        "offload tier), cached (only vLLM's own prefix cache had some of it), cold, bypassed.",
    ),
    Metric(
        "vllm_stateful_bypassed_turns",
        "counter",
        "bypasses",
        "reason",
        "Turns that were left to stock vLLM, by reason.",
    ),
    Metric(
        "vllm_stateful_edits",
        "counter",
        "edits",
        "kind",
        "Histories that came back changed, by the kind of the message in which the first change "
        "lies: system, tools, user, assistant, reasoning, tool_call, tool_result, other.",
    ),
    Metric(
        "vllm_stateful_reasoning_tokens_dropped",
        "counter",
        "num_reasoning_dropped",
        None,
        "Tokens of answers that were not kept, as the next prompt was expected without them.",
    ),
    Metric(
        "vllm_stateful_prefills_joined",
        "counter",
        "num_prefills_joined",
        None,
        "Turns that waited until another had computed the prefix that both share.",
    ),
    Metric(
        "vllm_stateful_tokens_drafted",
        "counter",
        "num_tokens_drafted",
        None,
        "Tokens that were drafted from sessions.",
    ),
    Metric(
        "vllm_stateful_drafts_accepted",
        "counter",
        "num_drafts_accepted",
        None,
        "Tokens drafted from sessions that the model accepted.",
    ),
    Metric(
        "vllm_stateful_attention_steps",
        "counter",
        "attention_steps",
        "served_by",
        "With --stateful-attention, steps whose attention our kernels computed (taken), or why "
        "vLLM's did. Counted where the worker runs in the engine's process.",
    ),
    Metric(
        "vllm_stateful_offloads_declined",
        "counter",
        "num_offloads_declined",
        None,
        "Turns whose KV was not given to vLLM's offload tier, as it is worth less than what would "
        "have gone for it.",
    ),
    Metric(
        "vllm_stateful_offload_working_set_ratio",
        "gauge",
        "offload_working_set",
        None,
        "Tokens of the sessions that are expected back, as a multiple of the offload tier.",
    ),
    Metric(
        "vllm_stateful_resume_points",
        "counter",
        "resume_points",
        "result",
        "Resume points that were wanted inside prompts and answers, of models that cannot be "
        "continued at every position: taken, missed (no block was free, or what it needs was "
        "gone).",
    ),
    Metric(
        "vllm_stateful_waits",
        "counter",
        "waits",
        "kind",
        "Turns that ended, by what their session waits for: tool, user, one_shot (not known to "
        "come back).",
    ),
    Metric(
        "vllm_stateful_answers_unread",
        "counter",
        "num_answers_unread",
        None,
        "Answers whose tool is not known, as the tokenizer failed on them.",
    ),
    Metric(
        "vllm_stateful_demotions",
        "counter",
        "demotions",
        "reason",
        "Residencies that gave blocks back, all or those of their end, by reason.",
    ),
    Metric(
        "vllm_stateful_prompt_tokens_reused",
        "counter",
        "num_tokens_reused",
        None,
        "Prompt tokens whose KV was there already.",
    ),
    Metric(
        "vllm_stateful_prompt_tokens_computed",
        "counter",
        "num_tokens_computed",
        None,
        "Prompt tokens that had to be computed.",
    ),
    Metric(
        "vllm_stateful_blocks_pinned",
        "gauge",
        "num_blocks_pinned",
        None,
        "KV cache blocks that only waiting sessions hold.",
    ),
    Metric(
        "vllm_stateful_blocks_budget",
        "gauge",
        "num_blocks_budget",
        None,
        "Most KV cache blocks that waiting sessions may hold.",
    ),
    Metric(
        "vllm_stateful_sessions",
        "gauge",
        "num_sessions",
        None,
        "Sessions whose KV is resident.",
    ),
    Metric(
        "vllm_stateful_resume_seconds",
        "histogram",
        "resume_latencies_s",
        None,
        "Host time that a turn spent on finding, verifying and adopting its KV.",
    ),
    Metric(
        "vllm_stateful_chats_validated",
        "counter",
        "chats_validated",
        "how",
        "Chat requests of many messages by how they were validated: shape (plain messages by their "
        "shape alone), full (all by vLLM).",
        "api",
    ),
    Metric(
        "vllm_stateful_chats_rendered",
        "counter",
        "chats_rendered",
        "how",
        "Conversations of many messages by how they were rendered: incremental, full.",
        "api",
    ),
    Metric(
        "vllm_stateful_prompts_tokenized",
        "counter",
        "prompts_tokenized",
        "how",
        "Prompts by how they were tokenized: incremental, full; or by stock vLLM, and why: short, "
        "tokenizer, parameters, multimodal, unusual.",
        "api",
    ),
    Metric(
        "vllm_stateful_prompt_tokens_tokenized",
        "counter",
        "num_tokens_tokenized",
        "kind",
        "Prompt tokens that were known from an earlier prompt (reused), and others (new).",
        "api",
    ),
    Metric(
        "vllm_stateful_prompts_verified",
        "counter",
        "prompts_verified",
        "result",
        "Incrementally tokenized prompts that were tokenized in full as well: equal, different.",
        "api",
    ),
    Metric(
        "vllm_stateful_prompts_sent",
        "counter",
        "prompts_sent",
        "how",
        "Prompts by how they were sent to the engine: delta, full, resent.",
        "api",
    ),
    Metric(
        "vllm_stateful_engine_questions_failed",
        "counter",
        "engine_questions_failed",
        None,
        "Times that an engine core did not say whether it takes prompts as deltas. Asked again.",
        "api",
    ),
    Metric(
        "vllm_stateful_engine_choices",
        "counter",
        "engine_choices",
        "why",
        "With several engine cores (data parallelism), turns by why they went to theirs: home, "
        "hashed (as each API server would), moved (too much to do at home: vLLM chose), new "
        "(vLLM chose), client.",
        "api",
    ),
    Metric(
        "vllm_stateful_answers",
        "counter",
        "answers",
        "result",
        "Generated answers that came back in a history, with --stateful-history generated: kept, "
        "different, unfinished.",
        "api",
    ),
    Metric(
        "vllm_stateful_responses",
        "counter",
        "responses",
        "result",
        "Requests that may be remembered: hit (answered from memory), joined (answered with an "
        "equal one in flight), miss; and stored, the answers that are remembered.",
        "api",
    ),
    Metric(
        "vllm_stateful_responses_uncached",
        "counter",
        "responses_uncached",
        "reason",
        "Requests that may not be remembered, by reason.",
        "api",
    ),
    Metric(
        "vllm_stateful_response_cache_bytes",
        "gauge",
        "response_cache_bytes",
        None,
        "Memory that remembered answers take in the API servers.",
        "api",
    ),
    Metric(
        "vllm_stateful_tool_calls_checked",
        "counter",
        "tool_calls_checked",
        "result",
        "Tool calls that were followed while they were generated: valid, invalid, unfinished.",
        "api",
    ),
    Metric(
        "vllm_stateful_tool_calls_unchecked",
        "counter",
        "tool_calls_unchecked",
        "reason",
        "Requests with tools (parser, reasoning, parameters, tools) and tool calls (schema, "
        "too_long, too_deep, unreadable, error) that were not judged, by reason.",
        "api",
    ),
    Metric(
        "vllm_stateful_turns_ended_at_tool_call",
        "counter",
        "turns_ended_at_tool_call",
        "why",
        "Turns that were ended at a tool call: complete (the last that was allowed), invalid.",
        "api",
    ),
    Metric(
        "vllm_stateful_cache_diagnostics",
        "counter",
        "cache_diagnostics",
        "result",
        "Requests that ask why not more was reused: first, same, not_found, unavailable, "
        "malformed, or what has changed (model_changed, ...).",
        "api",
    ),
    Metric(
        "vllm_stateful_hints_ignored",
        "counter",
        "hints_ignored",
        "source",
        "Requests with a hint that could not be read, by where it stood: agent_hint, session_id, "
        "session_final, compaction, retry, window, cache_control, prompt_cache_retention, "
        "prompt_cache_options, session_retain.",
        "api",
    ),
    Metric(
        "vllm_stateful_render_bytes",
        "gauge",
        "render_bytes",
        None,
        "Memory that remembered prompts take in the API servers.",
        "api",
    ),
)

RESUME_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1.0)
