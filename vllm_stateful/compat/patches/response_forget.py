# SPDX-License-Identifier: Apache-2.0
"""New weights, another adapter, an emptied cache: what was answered before no longer holds."""

from collections.abc import Awaitable, Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any, str], None]] = Hook("response-forget")
"""Gets the client and the name of what the engine core is asked to do, before it is."""

done: Hook[Callable[[Any, str, Any], Awaitable[None]]] = Hook("response-forget-done")
"""Gets the same and the engine, once it is done; the caller waits for this too."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    async def _call_utility_async(self: Any, method: str, *args: Any, engine: Any) -> Any:
        if (fn := hook.fn) is not None:
            fn(self, method)
        try:
            return await original(self, method, *args, engine=engine)
        finally:
            if (after := done.fn) is not None:
                await after(self, method, engine)

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
