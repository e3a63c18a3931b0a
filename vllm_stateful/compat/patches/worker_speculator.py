# SPDX-License-Identifier: Apache-2.0
"""Model runner V2 drafts with vLLM's own speculators only."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Callable[..., Any], Any, Any, Any], Any]] = Hook("worker-speculator")
"""Gets vLLM's function, its configuration, the device and the table of requests; returns the
speculator."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        if (fn := hook.fn) is None:
            return original(vllm_config, device, req_states)
        return fn(original, vllm_config, device, req_states)

    return init_speculator


PATCH = Patch(
    name="worker-speculator",
    target="vllm.v1.worker.gpu.model_runner:init_speculator",
    wrap=_wrap,
    symptom="ngram_gpu takes the longest match of at most prompt_lookup_max tokens, in the prompt "
    "alone, and nothing can take its place; custom_class falls back to model runner V1 without "
    "async scheduling.",
    reason="The method is chosen by an if-chain in the worker, without a registry.",
    feature="device-drafts",
    process="worker",
    signature="(vllm_config, device, req_states)",
    upstream="vllm-0.32/0015-device-drafts.patch",
    remove_when="custom_class works on model runner V2.",
)
