# SPDX-License-Identifier: Apache-2.0
"""Every turn's prompt is decoded, hashed and converted from its first token on."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any, Any, Callable[[Any, Any], Any]], Any]] = Hook("prompt-handover")
"""Gets the engine core, the request and the original method; returns what that returns."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def preprocess_add_request(self: Any, request: Any) -> Any:
        if (fn := hook.fn) is None:
            return original(self, request)
        return fn(self, request, original)

    return preprocess_add_request


PATCH = Patch(
    name="prompt-handover",
    target="vllm.v1.engine.core:EngineCore.preprocess_add_request",
    wrap=_wrap,
    symptom="For 700 new tokens after 100k, the engine core computes the hashes of all blocks "
    "again (9 ms at block size 16).",
    reason="`Request` is built from the complete prompt, with no room for hashes that are known; "
    "and a prompt that came as a delta has to be put together before that.",
    feature="transport",
    process="engine",
    signature="(self, request)",
    upstream="vllm-0.32/0008-prompt-transport.patch",
    remove_when="a plugin can encode and decode the requests to the engine core.",
)
