# SPDX-License-Identifier: Apache-2.0
"""``metadata.user_id`` of an Anthropic request, in which Claude Code names its session."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any, Any], None]] = Hook("anthropic-metadata")
"""Gets the Anthropic request and the ChatCompletionRequest made from it; may change the second.
The first is an AnthropicCountTokensRequest, which has no ``metadata``, when only counting."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def to_chat_completion_request(cls: Any, anthropic_request: Any, **kwargs: Any) -> Any:
        chat_request = original(cls, anthropic_request, **kwargs)
        if (fn := hook.fn) is not None:
            fn(anthropic_request, chat_request)
        return chat_request

    return to_chat_completion_request


PATCH = Patch(
    name="anthropic-metadata",
    target="vllm.entrypoints.anthropic.serving:AnthropicServingMessages.to_chat_completion_request",
    wrap=_wrap,
    symptom="`metadata.user_id` of POST /v1/messages is dropped: neither `user` nor a session id "
    "of the chat request carries it.",
    reason="The conversion copies a fixed list of fields and is the last place that sees both "
    "requests.",
    feature="anthropic-identity",
    process="api",
    signature="(cls, anthropic_request, *, merge_inline_system=..., disabled_thinking_effort=...)",
    upstream="vllm-0.32/0006-anthropic-metadata.patch",
    remove_when="vLLM passes `metadata.user_id` on to the chat request.",
)
