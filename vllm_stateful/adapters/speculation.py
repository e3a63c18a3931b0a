# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's options make it take drafts from sessions.

On CUDA, model runner V2 looks drafts up on the device (`lookup_speculator`), so async scheduling
and CUDA graphs stay in use::

    --speculative-config '{"method": "ngram_gpu", "num_speculative_tokens": 8}'

Elsewhere the engine core looks drafts up. It knows more, and can wait for the worker. It is turned
on by vLLM's own option, without a patch::

    --speculative-config '{"method": "custom_class", "num_speculative_tokens": 16,
      "model": "vllm_stateful.adapters.speculation.SessionDrafter"}'

vLLM asks its worker for drafts after each step and gives them to the scheduler, which makes the
next step verify them. With this option the worker proposes nothing, and the scheduler uses the
session's drafts instead (`engine_drafts`, which is imported only then, as its index is
compiled). The rest is unchanged vLLM: grammars cut drafts, and the rejection sampler keeps the
distribution.

``--stateful-drafts on`` makes the one or the other. ``auto``, the default, makes the second where
it was measured never to slow a server down by more than 3 %: on a CPU (`why_auto_drafts_nothing`).

If the model has a drafting head (EAGLE, MTP, ...), the head drafts. A draft from the session
replaces the head's draft where such drafts were right more often (`beside_head`). This is done on
the device with model runner V2, and in the engine core without async scheduling.
"""

from __future__ import annotations

import copy
import os
from importlib.metadata import entry_points
from typing import Any

from vllm_stateful.compat.ledger import patch_of
from vllm_stateful.config import StatefulConfig

ON_DEVICE: dict[str, Any] = {
    "method": "ngram_gpu",
    "num_speculative_tokens": 8,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 16,
    "num_speculative_tokens_per_batch_size": [[1, 8, 8], [9, 32, 3], [33, 1024, 0]],
}
"""vLLM's ``--speculative-config`` on CUDA."""


IN_WORKER = ("worker-logits", "worker-sampler")
"""The patches of a worker whose drafts come from the engine core."""


class SessionDrafter:
    """A ``custom_class`` proposer for vLLM's worker, which leaves drafting to the engine core."""

    def __init__(self, vllm_config: Any) -> None:
        # The worker makes its drafter just before its logits processors. Also where the plugin is
        # not on: nothing is drafted there, and an API server elsewhere may take all parameters.
        for name in IN_WORKER:
            patch_of(name).apply()

    def propose(self, sampled_token_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        """Propose no drafts: one empty list for each request."""
        return [[] for _ in sampled_token_ids]

    def load_model(self, *_: Any, **__: Any) -> None:
        """Do nothing: there is no model."""


NAME = f"{SessionDrafter.__module__}.{SessionDrafter.__qualname__}"


IN_ENGINE_CORE: dict[str, Any] = {
    "method": "custom_class",
    "num_speculative_tokens": 16,
    "model": NAME,
}
"""vLLM's ``--speculative-config`` elsewhere."""


def is_asked_for(vllm_config: Any) -> bool:
    """Whether vLLM was told to take drafts from sessions."""
    config = vllm_config.speculative_config
    return config is not None and config.method == "custom_class" and config.model == NAME


def is_looked_up(vllm_config: Any) -> bool:
    """Whether drafts are looked up on the device, by model runner V2."""
    config = vllm_config.speculative_config
    return config is not None and config.method == "ngram_gpu" and vllm_config.use_v2_model_runner


def without_speculation(vllm_config: Any) -> Any:
    """Hook of ``worker-logits``: the configuration to build the worker's logits processors for.

    Requests that use them get no drafts (`uses_logits_processors`). So all can be there.
    """
    if not is_asked_for(vllm_config):
        return vllm_config
    plain = copy.copy(vllm_config)
    plain.speculative_config = None
    return plain


def uses_logits_processors(params: Any) -> bool:
    """Whether model runner V1 samples a request with processors that drafts would not pass.

    Args:
        params: vLLM's ``SamplingParams``.
    """
    return params.min_p > MIN_P or bool(params.logit_bias)


def is_beyond_verifying(params: Any) -> bool:
    """Whether no step of model runner V1 may verify drafts while a request is in its batch.

    The rejection sampler ends the engine at ``logprob_token_ids``, whosever drafts it verifies.

    Args:
        params: vLLM's ``SamplingParams``.
    """
    return params.logprob_token_ids is not None


def drafted_only(metadata: Any) -> Any:
    """Hook of ``worker-sampler``: what a step verifies; None if nothing was drafted.

    Args:
        metadata: vLLM's ``SpecDecodeMetadata`` of a step, or None.
    """
    return metadata if metadata is not None and any(metadata.num_draft_tokens) else None


MIN_P = 1e-5
"""vLLM's ``_SAMPLING_EPS``: with a smaller ``min_p`` there is none."""

PROCESSOR_GROUP = "vllm.logits_processors"


CUSTOM_PROCESSORS = "custom logits processors may change any request"


def has_custom_processors(model_config: Any) -> bool:
    """Whether the user added logits processors: which requests they change is not known."""
    return bool(model_config.logits_processors) or bool(entry_points(group=PROCESSOR_GROUP))


def take_all_parameters(processor: Any) -> None:
    """First hook of ``request-identity``: refuse no request because sessions draft.

    vLLM refuses ``min_p`` and ``logit_bias`` beside all drafts. Model runner V2 verifies drafts
    under them. On V1, requests with them get no drafts.

    Args:
        processor: vLLM's ``InputProcessor``.
    """
    if processor.speculative_config is None:
        return
    if processor.vllm_config.model_config.enable_trace_replay:
        return  # vLLM refuses a trace of tokens beside drafts, and these would not follow it
    if is_asked_for(processor.vllm_config) or is_looked_up(processor.vllm_config):
        processor.speculative_config = None  # only the refusal reads it


def why_no_drafts(config: StatefulConfig) -> str:
    """Why nothing is drafted, where vLLM has no ``--speculative-config``.

    Args:
        config: the options of the plugin.
    """
    if config.drafts == "off":
        return "--stateful-drafts off"
    reason = os.environ.get(NO_DRAFTS_ENV, "only `vllm serve` makes a --speculative-config")
    return f"--stateful-drafts {config.drafts}: {reason}"


NO_DRAFTS_ENV = "STATEFUL_NO_DRAFTS_REASON"
"""Why `vllm serve` made no ``--speculative-config``; its child processes inherit it."""


def why_auto_drafts_nothing(model_config: Any, num_stages: int) -> str | None:
    """Why ``--stateful-drafts auto`` makes none for a model on a CPU; None where it makes one.

    Args:
        model_config: vLLM's ``ModelConfig``.
        num_stages: of pipeline parallelism.
    """
    model = model_config
    reasons = {
        "the model generates no text": model.runner_type != "generate",
        "the model has an encoder of its own": model.is_encoder_decoder,
        "the model generates by diffusion": model.is_diffusion,
        "each draft takes a recurrent state of its own": model.has_inner_state,
        "prompts may be embeddings": model.enable_prompt_embeds,
        "pipeline parallelism": num_stages > 1,
    }
    if has_custom_processors(model):
        return CUSTOM_PROCESSORS
    return next((reason for reason, holds in reasons.items() if holds), None)


NO_HEAD = frozenset({"ngram", "ngram_gpu", "suffix", "custom_class", "extract_hidden_states"})
"""vLLM's speculation methods that draft without a head, or do not draft."""


def has_head(vllm_config: Any) -> bool:
    """Whether a drafting head or a smaller model drafts."""
    config = vllm_config.speculative_config
    return config is not None and config.method not in NO_HEAD


def why_not_beside_head(vllm_config: Any, config: StatefulConfig) -> str | None:
    """Why sessions do not draft beside a head; None if they do.

    Args:
        vllm_config: vLLM's configuration, with a drafting head.
        config: the options of the plugin.
    """
    head = vllm_config.speculative_config
    if config.drafts == "off":
        return "--stateful-drafts off"
    if head.draft_sample_method != "greedy":
        return f"draft_sample_method {head.draft_sample_method}"
    if head.rejection_sample_method not in ("standard", "block"):  # others accept wrong tokens, too
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
