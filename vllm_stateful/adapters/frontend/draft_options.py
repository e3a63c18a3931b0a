# SPDX-License-Identifier: Apache-2.0
"""The ``--speculative-config`` that ``--stateful-drafts`` makes, if nothing else drafts."""

from __future__ import annotations

import argparse
import os

from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.platforms.interface import CpuArchEnum
from vllm.transformers_utils.config import maybe_override_with_speculators
from vllm.transformers_utils.utils import is_cloud_storage

from vllm_stateful.adapters.fit import off_reason
from vllm_stateful.adapters.speculation import (
    IN_ENGINE_CORE,
    NO_DRAFTS_ENV,
    ON_DEVICE,
    why_auto_drafts_nothing,
)
from vllm_stateful.config import is_enabled, process_config

GIVEN = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
"""vLLM's options that say what drafts."""


def take_drafts(namespace: argparse.Namespace) -> None:
    """Set ``speculative_config`` where drafts from sessions are wanted.

    ``on`` wants them for every model that brings no drafting head along, and on a CPU has no
    recurrent states: vLLM's copies of them are kernels of Triton. ``auto`` wants them where
    `why_auto_drafts_nothing` has no objection. If there are none, `NO_DRAFTS_ENV` says why.

    Args:
        namespace: the whole command line.
    """
    os.environ.pop(NO_DRAFTS_ENV, None)
    wanted = process_config().drafts
    if wanted == "off" or not is_enabled() or off_reason() is not None:
        return
    if any(getattr(namespace, name, None) is not None for name in GIVEN):
        return
    try:
        reason = _why_not(namespace, wanted)
    except Exception as error:  # vLLM is about to meet it, too, and says it in its own way
        reason = f"the model was not understood ({type(error).__name__})"
        if wanted == "on":
            reason = None
    if reason is None:
        made = ON_DEVICE if current_platform.is_cuda() else IN_ENGINE_CORE
        namespace.speculative_config = dict(made)
    else:
        os.environ[NO_DRAFTS_ENV] = reason


def _is_measured() -> bool:
    """Whether it was measured here that drafts never slow a server down by more than 3 %."""
    is_x86: bool = current_platform.get_cpu_architecture() == CpuArchEnum.X86
    return is_x86 and bool(current_platform.is_cpu())


def _why_not(namespace: argparse.Namespace, wanted: str) -> str | None:
    """Why there are no drafts from sessions; None if there are."""
    if wanted == "auto" and not _is_measured():
        return "their speed was not measured on this platform yet"
    tag = getattr(namespace, "model_tag", None)  # MODEL, which stands for --model
    named = {} if tag is None else {"model": tag}
    given = EngineArgs.from_cli_args(argparse.Namespace(**{**vars(namespace), **named}))
    if not is_cloud_storage(given.model):
        _, _, of_model = maybe_override_with_speculators(
            model=given.model,
            tokenizer=given.tokenizer,
            revision=given.revision,
            trust_remote_code=given.trust_remote_code,
            hf_token=given.hf_token,
        )
        if of_model is not None:
            return "the model brings a drafting head along"
    if wanted == "on":
        has_states = current_platform.is_cpu() and given.create_model_config().has_inner_state
        return "vLLM on a CPU copies no recurrent states beside drafts" if has_states else None
    if getattr(namespace, "snapshot_dir", None) is not None:
        return "vLLM takes no snapshot of a server that drafts"
    if given.enable_prefix_caching is False:
        return "sessions are off without prefix caching"
    if given.async_scheduling:
        return "vLLM takes them only without --async-scheduling"
    if given.enable_lora:
        return "vLLM asks for a larger --max-num-batched-tokens with LoRA"
    if given.watermark_config is not None:
        return "vLLM watermarks only what it drafts itself"
    if given.structured_outputs_config.backend == "lm-format-enforcer":
        return "lm-format-enforcer cannot check drafts"
    return why_auto_drafts_nothing(given.create_model_config(), given.pipeline_parallel_size)
