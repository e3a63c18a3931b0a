# SPDX-License-Identifier: Apache-2.0
"""New weights, another adapter, an emptied cache: what was answered before no longer holds."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any, str], None]] = Hook("response-forget")
"""Gets the client and the name of what the engine core is asked to do."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    async def _call_utility_async(self: Any, method: str, *args: Any, engine: Any) -> Any:
        if (fn := hook.fn) is not None:
            fn(self, method)
        result = await original(self, method, *args, engine=engine)
        if (fn := hook.fn) is not None:
            fn(self, method)  # and what was answered meanwhile
        return result

    return _call_utility_async


PATCH = Patch(
    name="response-forget",
    target="vllm.v1.engine.core_client:AsyncMPClient._call_utility_async",
    wrap=_wrap,
    symptom="None in stock vLLM: part of response-request.",
    reason="Weight updates, adapters, sleep and resets all pass here, and nowhere else together.",
    feature="responses",
    process="api",
    signature="async (self, method, *args, engine)",
    upstream="vllm-0.32/0013-response-cache.patch",
    remove_when="a plugin can answer an EngineCoreRequest in the place of the engine core.",
)
