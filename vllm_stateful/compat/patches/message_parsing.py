# SPDX-License-Identifier: Apache-2.0
"""Every turn parses all messages of the conversation again."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[..., Any]] = Hook("message-parsing")
"""Gets the original function, then its arguments; awaitable, returns what that returns."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    async def parse_chat_messages_async(
        messages: Any,
        model_config: Any,
        content_format: Any,
        media_io_kwargs: Any = None,
        mm_processor_kwargs: Any = None,
    ) -> Any:
        arguments = (model_config, content_format, media_io_kwargs, mm_processor_kwargs)
        if (fn := hook.fn) is None:
            return await original(messages, *arguments)
        return await fn(original, messages, *arguments)

    return parse_chat_messages_async


PATCH = Patch(
    name="message-parsing",
    target="vllm.renderers.hf:parse_chat_messages_async",
    wrap=_wrap,
    symptom="A turn of a conversation of 400 messages blocks the event loop for 2 ms while all "
    "of them are parsed again.",
    reason="The function parses one message after the other, each on its own, but is only ever "
    "given all of them; it is called in the middle of a method that is better not copied.",
    feature="messages",
    process="api",
    signature="async (messages, model_config, content_format, media_io_kwargs=..., "
    "mm_processor_kwargs=...)",
    upstream="vllm-0.32/0012-message-parsing.patch",
    remove_when="vLLM parses only the messages that a turn adds.",
)
