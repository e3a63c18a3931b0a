# SPDX-License-Identifier: Apache-2.0
"""The one table of metrics: names, units, labels, and where each figure comes from."""

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """One Prometheus metric and the entry of the engine's snapshot that feeds it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    key: str
    label: str | None
    help: str


METRICS: tuple[Metric, ...] = (
    Metric(
        "vllm_stateful_turns",
        "counter",
        "turns",
        "outcome",
        "Turns by how they found their context: resumed, forked, diverged, cold, bypassed.",
    ),
    Metric(
        "vllm_stateful_bypassed_turns",
        "counter",
        "bypasses",
        "reason",
        "Turns that were left to stock vLLM, by reason.",
    ),
    Metric(
        "vllm_stateful_demotions",
        "counter",
        "demotions",
        "reason",
        "Residencies that gave their blocks back, by reason.",
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
)

RESUME_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1.0)
