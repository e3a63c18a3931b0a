# SPDX-License-Identifier: Apache-2.0
"""Adds ``prompt_cache_diagnostics`` to answers of two of OpenAI's routes.

The routes are POST /v1/responses and POST /v1/chat/completions. No function of vLLM that a plugin
may replace sees such an answer as an object, so the answer is completed while it is sent. Only the
answer to a request that asks is changed. It gets one field, at the end of the object, or in the one
event of a stream that has the final numbers. The other events of a stream pass at once, byte for
byte. An answer that is only to be remembered is read and passes unchanged.
"""

from __future__ import annotations

import json
from typing import Any

from vllm.logger import init_logger

from vllm_stateful.adapters.frontend.cache_diagnostics import Api, Diagnosis, diagnosis_in

logger = init_logger("vllm.stateful")

_FIELD = "prompt_cache_diagnostics"
_PATHS = (Api.RESPONSES, Api.CHAT)
_FINAL = (b"event: response.completed\n", b"event: response.incomplete\n")
_ENDED = frozenset({"completed", "incomplete"})
_DATA, _END = b"data: ", b"\n\n"


class OpenAIDiagnostics:
    """ASGI middleware that completes the answers of two routes."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass everything else on unchanged."""
        if scope["type"] == "http" and scope["path"].endswith(_PATHS):
            send = _Answer(scope, send)
        await self.app(scope, receive, send)


class _Answer:
    """Sends one answer on, and completes it.

    Args:
        scope: the scope of the HTTP request. Whether the request asks is known when the answer
            starts.
        send: the server's ``send``.
    """

    def __init__(self, scope: Any, send: Any) -> None:
        self._scope = scope
        self._send = send
        self._diagnosis: Diagnosis | None = None
        self._is_stream = False
        self._start: Any = None
        self._parts: list[bytes] = []
        self._is_said = False

    async def __call__(self, message: Any) -> None:
        """Do what ASGI's ``send`` does."""
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif self._diagnosis is None or message["type"] != "http.response.body":
            await self._send(message)
        elif self._is_stream:
            await self._send({**message, "body": self._event(message.get("body", b""))})
        else:
            await self._part(message)

    async def _begin(self, message: Any) -> None:
        headers = {bytes(name).lower(): bytes(value) for name, value in message["headers"]}
        found = diagnosis_in(self._scope)
        if message["status"] == 200 and b"content-encoding" not in headers:
            self._diagnosis = found
            self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        if self._is_held:
            self._start = message
        else:
            await self._send(message)

    @property
    def _is_held(self) -> bool:
        """Whether the answer must be complete before it is sent, because it gets longer."""
        return self._diagnosis is not None and self._diagnosis.is_asked and not self._is_stream

    async def _part(self, message: Any) -> None:
        self._parts.append(message.get("body", b""))
        if not self._is_held:
            await self._send(message)
        if message.get("more_body"):
            return
        whole = b"".join(self._parts)
        completed = self._completed(whole, whole)
        if self._is_held:
            length = str(len(completed)).encode()
            headers = [
                (name, length if bytes(name).lower() == b"content-length" else value)
                for name, value in self._start["headers"]
            ]
            await self._send({**self._start, "headers": headers})
            await self._send({**message, "body": completed})

    def _event(self, event: bytes) -> bytes:
        """The bytes to send for an event of a stream."""
        assert self._diagnosis is not None
        if self._diagnosis.api is Api.RESPONSES:
            is_read = event.startswith(_FINAL)
        else:
            is_read = b'"finish_reason":"' in event or b'"usage":{' in event
        start = event.find(_DATA) + len(_DATA)
        if not is_read or start < len(_DATA) or not event.endswith(_END):
            return event
        return self._completed(event, event[start : -len(_END)], event[:start], _END)

    def _completed(self, stock: bytes, data: bytes, head: bytes = b"", tail: bytes = b"") -> bytes:
        """The bytes that vLLM sends, with the field in them where it is wanted."""
        try:
            made = self._with_field(data)
        except Exception as error:  # then vLLM's answer is sent as it is
            logger.warning("stateful: an answer could not be completed: %r", error)
            return stock
        return stock if made is None else head + made + tail

    def _with_field(self, data: bytes) -> bytes | None:
        """The object with the field; None where it stays as it is."""
        diagnosis = self._diagnosis
        assert diagnosis is not None
        content = json.loads(data)
        answer = content.get("response", content) if self._is_stream else content
        is_chat = diagnosis.api is Api.CHAT
        is_last = self._is_last_chunk(answer) if is_chat else answer.get("status") in _ENDED
        num_cached, num_reusable = _tokens(answer.get("usage") or {}, is_chat)
        if is_last or self._is_said:
            diagnosis.answered(answer.get("id"), num_reusable)
        if not is_last or self._is_said or not diagnosis.is_asked:
            return None
        self._is_said = True
        field = diagnosis.of_responses(num_cached)
        if answer is content:
            said = json.dumps({_FIELD: field}, separators=(",", ":"))
            return data.rstrip()[:-1] + b"," + said[1:].encode()
        answer[_FIELD] = field
        return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()

    def _is_last_chunk(self, answer: dict[str, Any]) -> bool:
        """Whether a chat completion, or a chunk of its stream, has the final numbers."""
        assert self._diagnosis is not None
        if not self._is_stream:
            return True
        choices = answer.get("choices") or []
        if self._diagnosis.has_usage_chunk:
            return not choices
        return any(choice.get("finish_reason") for choice in choices)


def _tokens(usage: dict[str, Any], is_chat: bool) -> tuple[int | None, int | None]:
    """The prompt's tokens that were read, and that can be read; None where not counted.

    OpenAI documents the second number as the sum of the tokens read and written.
    """
    kind, written = (
        ("prompt", "created_cache_tokens") if is_chat else ("input", "cache_write_tokens")
    )
    details = usage.get(f"{kind}_tokens_details") or {}
    num_cached, num_written = details.get("cached_tokens"), details.get(written)
    if num_cached is not None and num_written is not None:
        return num_cached, num_cached + num_written
    return num_cached, usage.get(f"{kind}_tokens")
