# SPDX-License-Identifier: Apache-2.0
"""The same request is computed again each time, and as often as it is in flight."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any, Any], bool]] = Hook("response-request")
"""Gets the client of the engine core and the request; whether it is answered without the engine."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    async def add_request_async(self: Any, request: Any) -> None:
        if (fn := hook.fn) is None or not fn(self, request):
            await original(self, request)

    return add_request_async


PATCH = Patch(
    name="response-request",
    target="vllm.v1.engine.core_client:AsyncMPClient.add_request_async",
    wrap=_wrap,
    symptom="A greedy request that was answered a moment ago, or is being answered right now, is "
    "computed once more in full.",
    reason="Below this point a request is a message; above it each endpoint has a way of its own "
    "to make a stream of an answer. No plugin may stand between the two.",
    feature="responses",
    process="api",
    signature="async (self, request)",
    upstream="vllm-0.32/0013-response-cache.patch",
    remove_when="a plugin can answer an EngineCoreRequest in the place of the engine core.",
)
