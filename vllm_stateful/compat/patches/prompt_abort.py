# SPDX-License-Identifier: Apache-2.0
"""An abort of a request whose prompt is about to be sent again, with several engine cores."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any, list[str]], None]] = Hook("prompt-abort")
"""Gets the client and the ids of the requests that are aborted."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    async def abort_requests_async(self: Any, request_ids: list[str]) -> None:
        if (fn := hook.fn) is not None:
            fn(self, request_ids)
        await original(self, request_ids)

    return abort_requests_async


PATCH = Patch(
    name="prompt-abort",
    target="vllm.v1.engine.core_client:DPLBAsyncMPClient.abort_requests_async",
    wrap=_wrap,
    symptom="None in stock vLLM: with data parallelism, part of prompt-answers.",
    reason="The client of several engine cores sends no abort for a request that an engine "
    "answered with a miss; so it would be sent again after it was aborted.",
    feature="transport",
    process="api",
    signature="async (self, request_ids)",
    upstream="vllm-0.32/0008-prompt-transport.patch",
    remove_when="a plugin can encode and decode the requests to the engine core.",
)
