# SPDX-License-Identifier: Apache-2.0
"""What an Anthropic client is told about how long its conversation is kept."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any | None, Any], Any]] = Hook("anthropic-usage")
"""Gets the raw HTTP request (may be None) and vLLM's answer to it (a response, an error, or the
events of a stream as an async generator); returns the answer to send."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    async def create_messages(self: Any, request: Any, raw_request: Any | None = None) -> Any:
        answer = await original(self, request, raw_request)
        return answer if (fn := hook.fn) is None else fn(raw_request, answer)

    return create_messages


PATCH = Patch(
    name="anthropic-usage",
    target="vllm.entrypoints.anthropic.serving:AnthropicServingMessages.create_messages",
    wrap=_wrap,
    symptom="`cache_control` of POST /v1/messages is dropped, and `usage` has no `cache_creation`: "
    "a client that asks for a cache of one hour cannot see whether it got one.",
    reason="The request and its answer are together only here. A middleware sees bytes, and would "
    "have to decode each response and encode it again.",
    feature="anthropic-usage",
    process="api",
    signature="async (self, request, raw_request=...)",
    upstream="vllm-0.32/0006-anthropic-usage.patch",
    remove_when="vLLM answers `cache_control` with `usage.cache_creation`.",
)
