# SPDX-License-Identifier: Apache-2.0
"""The engine's answer that it does not hold the base of a prompt, kept from the client."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any, Any], list[Any]]] = Hook("prompt-answers")
"""Gets the client and the engine's outputs, takes misses out of them, and returns the requests
to send again."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    async def get_output_async(self: Any) -> Any:
        outputs = await original(self)
        if (fn := hook.fn) is not None:
            for request in fn(self, outputs):
                await self.add_request_async(request)
        return outputs

    return get_output_async


PATCH = Patch(
    name="prompt-answers",
    target="vllm.v1.engine.core_client:AsyncMPClient.get_output_async",
    wrap=_wrap,
    symptom="None in stock vLLM: the other half of prompt-send.",
    reason="An engine that gave up the base of a prompt says so in band, as vLLM does for its "
    "multimodal cache; the whole prompt is sent before the caller notices.",
    feature="transport",
    process="api",
    signature="async (self)",
    upstream="vllm-0.32/0008-prompt-transport.patch",
    remove_when="a plugin can encode and decode the requests to the engine core.",
)
