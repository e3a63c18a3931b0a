# SPDX-License-Identifier: Apache-2.0
"""vLLM's message parsing, for the messages that a turn adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_stateful.adapters.identity import current_tenant
from vllm_stateful.render.message_memory import MessageMemory, images_of

_memory = MessageMemory()


async def parse_new_messages(
    parse: Callable[..., Any],
    messages: list[Any],
    model_config: Any,
    content_format: str,
    media_io_kwargs: Any,
    mm_processor_kwargs: Any,
) -> Any:
    """Hook of ``message-parsing``: as ``parse_chat_messages_async``.

    Only plain conversations are remembered; media may come in the messages that are new.
    """
    arguments = (model_config, content_format, media_io_kwargs, mm_processor_kwargs)
    images = None if mm_processor_kwargs else images_of(messages)
    if images is None:
        return await parse(messages, *arguments)
    scope = (current_tenant(), id(model_config), content_format)
    known = _memory.find(scope, images)
    new = messages[known.num_messages :]
    conversation, mm_data, mm_uuids = await parse(new, *arguments)
    parsed = known.parsed + conversation
    if mm_data is None and mm_uuids is None:
        _memory.keep(scope, images, parsed, known)
    return [dict(message) for message in parsed], mm_data, mm_uuids
