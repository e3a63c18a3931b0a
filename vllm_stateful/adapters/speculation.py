# SPDX-License-Identifier: Apache-2.0
"""How vLLM is told to take drafts from sessions, and what a request may say about them.

On CUDA, model runner V2 looks drafts up on the device (`lookup_speculator`), so that async
scheduling and CUDA graphs stay::

    --speculative-config '{"method": "ngram_gpu", "num_speculative_tokens": 8}'

Elsewhere the engine core does, which knows more and can wait for the worker.

vLLM asks its worker for drafts after each step and hands them to the scheduler, which has the next
step verify them. Asked for by vLLM's own option, nothing is patched::

    --speculative-config '{"method": "custom_class", "num_speculative_tokens": 16,
      "model": "vllm_stateful.adapters.speculation.SessionDrafter"}'

the worker proposes nothing, and the scheduler puts the session's drafts in its place
(`scheduler_drafts`, imported only then: its index is compiled). Everything behind that is vLLM's:
grammars cut drafts, the rejection sampler keeps the distribution.

Where the model has a drafting head (EAGLE, MTP, ...), the head drafts, and what the session repeats
takes the place of its draft where that was right more often (`beside_head`): on the device with
model runner V2, in the engine core without async scheduling.
"""

from __future__ import annotations

from typing import Any

from vllm_stateful.config import StatefulConfig


class SessionDrafter:
    """vLLM's ``custom_class`` proposer in the worker: it leaves drafting to the engine core."""

    def __init__(self, vllm_config: Any) -> None:
        pass

    def propose(self, sampled_token_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        """No drafts, one empty list for each request."""
        return [[] for _ in sampled_token_ids]

    def load_model(self, *_: Any, **__: Any) -> None:
        """There is none."""


NAME = f"{SessionDrafter.__module__}.{SessionDrafter.__qualname__}"


def is_asked_for(vllm_config: Any) -> bool:
    """Whether vLLM was told to take drafts from sessions."""
    config = vllm_config.speculative_config
    return config is not None and config.method == "custom_class" and config.model == NAME


def is_looked_up(vllm_config: Any) -> bool:
    """Whether drafts are looked up on the device, by model runner V2."""
    config = vllm_config.speculative_config
    return config is not None and config.method == "ngram_gpu" and vllm_config.use_v2_model_runner


NO_HEAD = frozenset({"ngram", "ngram_gpu", "suffix", "custom_class", "extract_hidden_states"})
"""Methods of vLLM that draft without a head, or do not draft."""


def has_head(vllm_config: Any) -> bool:
    """Whether a drafting head, or a smaller model, drafts."""
    config = vllm_config.speculative_config
    return config is not None and config.method not in NO_HEAD


def why_not_beside_head(vllm_config: Any, config: StatefulConfig) -> str | None:
    """Why a head's drafts are left alone; None where sessions draft beside it.

    Args:
        vllm_config: with a drafting head.
        config: options of the plugin.
    """
    head = vllm_config.speculative_config
    if config.drafts == "off":
        return "--stateful-drafts off"
    if head.draft_sample_method != "greedy":
        return f"draft_sample_method {head.draft_sample_method}"
    if head.rejection_sample_method not in ("standard", "block"):  # others accept what is not right
        return f"rejection_sample_method {head.rejection_sample_method}"
    if getattr(vllm_config, "watermark_config", None) is not None:
        return "drafts are watermarked"
    if vllm_config.use_v2_model_runner:
        if config.drafts != "on":
            return "not measured on a device yet, --stateful-drafts on takes them"
        return "--stateful-disable device-drafts" if "device-drafts" in config.disable else None
    if vllm_config.scheduler_config.async_scheduling:
        return "async scheduling with model runner V1"
    return None
