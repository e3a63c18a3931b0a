# SPDX-License-Identifier: Apache-2.0
"""``usage.cache_creation`` of POST /v1/messages: for how long the written tokens are kept.

Only answers to requests with a ``cache_control`` breakpoint get it, and everything else in them
stays as vLLM made it. ``cache_creation_input_tokens`` counts what was computed and the next turn
can read: the partly filled last block too, as the session keeps it (``estimate_cached_tokens`` of
``adapters.engine.kv_blocks``). A stream says it where vLLM says what it is a part of: not in
``message_start``, which comes without any numbers of the cache, but in ``message_delta``.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse, AnthropicUsage

from vllm_stateful.adapters.frontend.sent_body import wish_of
from vllm_stateful.request.retention_wish import Ttl, cache_creation

_EVENTS_WITH_USAGE = ("event: message_start\n", "event: message_delta\n")


class _Usage(AnthropicUsage):  # type: ignore[misc]
    cache_creation: dict[str, int] | None = None


class _Answer(AnthropicMessagesResponse):  # type: ignore[misc]
    usage: _Usage | None = None


def with_cache_creation(raw_request: Any | None, answer: Any) -> Any:
    """Hook of ``anthropic-usage``: the answer, or the same answer with the breakdown.

    Args:
        raw_request: the HTTP request, or None when there is none.
        answer: vLLM's response, its error, or the server-sent events of a stream.
    """
    wish = wish_of(raw_request)
    if wish is None or wish.ttl is None:
        return answer
    if isinstance(answer, AnthropicMessagesResponse):
        return _with_usage(answer, wish.ttl)
    return _events(answer, wish.ttl) if hasattr(answer, "__aiter__") else answer


def _with_usage(answer: AnthropicMessagesResponse, ttl: Ttl) -> AnthropicMessagesResponse:
    if answer.usage is None:
        return answer
    usage = answer.usage.model_dump(exclude_unset=True)
    _add(usage, ttl)
    return _Answer(**{**dict(answer), "usage": usage})


async def _events(events: AsyncGenerator[str, None], ttl: Ttl) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        async for event in events:
            yield _with_usage_in(event, ttl) if event.startswith(_EVENTS_WITH_USAGE) else event


def _with_usage_in(event: str, ttl: Ttl) -> str:
    name, _, data = event.partition("\ndata: ")
    content = json.loads(data)
    usage = content.get("message", content).get("usage")
    if usage is None or not _add(usage, ttl):
        return event
    return f"{name}\ndata: {json.dumps(content, separators=(',', ':'), ensure_ascii=False)}\n\n"


def _add(usage: dict[str, Any], ttl: Ttl) -> bool:
    """Whether it is known how much was written."""
    written = usage.get("cache_creation_input_tokens")
    if written is None:
        return False
    usage["cache_creation"] = cache_creation(ttl, written)
    return True
