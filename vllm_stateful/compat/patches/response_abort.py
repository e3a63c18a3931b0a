# SPDX-License-Identifier: Apache-2.0
"""One client has gone, and others wait for the same answer."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any, list[str]], list[str]]] = Hook("response-abort")
"""Gets the client of the engine core and the ids of requests that nobody waits for; returns those
that the engine may end."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    async def abort_requests_async(self: Any, request_ids: list[str]) -> None:
        fn = hook.fn
        await original(self, request_ids if fn is None else fn(self, request_ids))

    return abort_requests_async


PATCH = Patch(
    name="response-abort",
    target="vllm.v1.engine.core_client:AsyncMPClient.abort_requests_async",
    wrap=_wrap,
    symptom="None in stock vLLM: part of response-request.",
    reason="The engine must go on with a request that others follow, and knows none that follows.",
    feature="responses",
    process="api",
    signature="async (self, request_ids)",
    upstream="vllm-0.32/0013-response-cache.patch",
    remove_when="a plugin can answer an EngineCoreRequest in the place of the engine core.",
)
