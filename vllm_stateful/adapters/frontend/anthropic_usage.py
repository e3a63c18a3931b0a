# SPDX-License-Identifier: Apache-2.0
"""Adds ``cache_creation`` and ``diagnostics`` to what vLLM answers to POST /v1/messages.

``usage.cache_creation`` says how long the written tokens are kept. Only answers to requests with a
``cache_control`` breakpoint get it. Everything else in them stays as vLLM made it.
``cache_creation_input_tokens`` counts the tokens that were computed and that the next turn can
read. It includes the partly filled last block, because the session keeps that too
(``estimate_cached_tokens`` of ``adapters.engine.kv_lookup``). In a stream, ``cache_creation`` comes
in ``message_delta``, where vLLM reports the numbers of the cache. ``message_start`` has none of
them.

``diagnostics`` says where the request differs from an earlier one (``cache_diagnostics``). Only
answers to requests with that field get it. In a stream it comes in ``message_start``.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pydantic import model_serializer
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse, AnthropicUsage

from vllm_stateful.adapters.frontend.cache_diagnostics import Diagnosis, diagnosis_of
from vllm_stateful.adapters.frontend.sent_body import wish_of
from vllm_stateful.request.retention_wish import Ttl, cache_creation

_START = "event: message_start\n"
_EVENTS_WITH_USAGE = ("event: message_start\n", "event: message_delta\n")


class _Usage(AnthropicUsage):  # type: ignore[misc]
    cache_creation: dict[str, int] | None = None


class _Answer(AnthropicMessagesResponse):  # type: ignore[misc]
    usage: _Usage | None = None


class _DiagnosedAnswer(_Answer):
    diagnostics: dict[str, Any] | None = None

    @model_serializer(mode="wrap")
    def _with_null(self, serialize: Any) -> Any:
        """Keep ``diagnostics`` even if it is None, which says that nothing was found."""
        return {**serialize(self), "diagnostics": self.diagnostics}


def with_cache_creation(raw_request: Any | None, answer: Any) -> Any:
    """First hook of ``anthropic-usage``: the answer, with ``cache_creation`` where it is wanted.

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
    name, content = _read(event)
    usage = content.get("message", content).get("usage")
    if usage is None or not _add(usage, ttl):
        return event
    return _written(name, content)


def _add(usage: dict[str, Any], ttl: Ttl) -> bool:
    """Add ``cache_creation``; whether it is known how much was written."""
    written = usage.get("cache_creation_input_tokens")
    if written is None:
        return False
    usage["cache_creation"] = cache_creation(ttl, written)
    return True


def with_diagnostics(raw_request: Any | None, answer: Any) -> Any:
    """Second hook of ``anthropic-usage``: the answer, with the diagnosis where it is wanted.

    Args:
        raw_request: the HTTP request, or None when there is none.
        answer: as for the first hook, which has been called before.
    """
    diagnosis = diagnosis_of(raw_request)
    if diagnosis is None or not diagnosis.is_asked:
        return answer
    if isinstance(answer, AnthropicMessagesResponse):
        usage = None if answer.usage is None else answer.usage.model_dump(exclude_unset=True)
        diagnosis.answered(answer.id, _num_prompt(usage))
        found = diagnosis.of_messages()
        return _DiagnosedAnswer(**{**dict(answer), "usage": usage, "diagnostics": found})
    return _diagnosed_events(answer, diagnosis) if hasattr(answer, "__aiter__") else answer


async def _diagnosed_events(
    events: AsyncGenerator[str, None], diagnosis: Diagnosis
) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        async for event in events:
            yield _with_diagnosis_in(event, diagnosis) if event.startswith(_START) else event


def _with_diagnosis_in(event: str, diagnosis: Diagnosis) -> str:
    name, content = _read(event)
    message = content["message"]
    diagnosis.answered(message.get("id"), _num_prompt(message.get("usage")))
    message["diagnostics"] = diagnosis.of_messages()
    return _written(name, content)


def _num_prompt(usage: dict[str, Any] | None) -> int:
    """The number of tokens in the prompt; 0 where they were not counted."""
    said = usage or {}
    names = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    return sum(said.get(name) or 0 for name in names)


def _read(event: str) -> tuple[str, dict[str, Any]]:
    """The first line of an event, and its content."""
    name, _, data = event.partition("\ndata: ")
    return name, json.loads(data)


def _written(name: str, content: dict[str, Any]) -> str:
    return f"{name}\ndata: {json.dumps(content, separators=(',', ':'), ensure_ascii=False)}\n\n"
