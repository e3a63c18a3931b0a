# SPDX-License-Identifier: Apache-2.0
"""A streaming chat client on a bare socket: what it measures is the server, not itself."""

import json
import re
import select
import socket
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

TIMEOUT_S = 900
_END_OF_STREAM = b"\r\n0\r\n\r\n"
_TEXT = re.compile(rb'"content":"[^"]')


class RequestFailedError(RuntimeError):
    """The server did not answer with a stream."""


@dataclass(frozen=True)
class Reply:
    """One answer; the times are of `time.perf_counter`, which all processes share on Linux.

    Attributes:
        first_s: The first event. vLLM sends it with the first token, after detokenizing it.
        first_text_s: The first event with text; one later, as the first carries the role only.
    """

    sent_s: float
    first_s: float
    first_text_s: float
    end_s: float
    text: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_answer_tokens: int


def encode_body(
    model: str, messages: list[dict[str, str]], max_tokens: int, **fields: Any
) -> bytes:
    """The body of a greedy, streamed chat request, with more fields where they are given."""
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    return json.dumps(body, ensure_ascii=False).encode()


class ChatClient:
    """One kept-alive connection to a server; use it in a `with` block."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._socket: socket.socket | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def ask(self, body: bytes) -> Reply:
        """Send one request and read the whole answer.

        Raises:
            RequestFailedError: the server answered with an error, or closed the connection.
        """
        connection = self._connected()
        host, port = self._address
        request = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        sent_s = time.perf_counter()
        connection.sendall(request)
        received, first_s, first_text_s = _receive(connection)
        end_s = time.perf_counter()
        text, usage = parse_stream(received)
        details = usage.get("prompt_tokens_details") or {}
        return Reply(
            sent_s,
            first_s,
            first_text_s or end_s,
            end_s,
            text,
            usage["prompt_tokens"],
            details.get("cached_tokens") or 0,
            usage["completion_tokens"],
        )

    def _connected(self) -> socket.socket:
        """The connection, a new one where the server has closed it meanwhile."""
        if self._socket is not None and select.select([self._socket], [], [], 0)[0]:
            self._close()
        if self._socket is None:
            self._socket = socket.create_connection(self._address, timeout=TIMEOUT_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._socket

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _receive(connection: socket.socket) -> tuple[bytes, float, float]:
    """The raw answer, and when its first event and its first text came."""
    received = bytearray()
    first_s = first_text_s = 0.0
    while not received.endswith(_END_OF_STREAM):
        part = connection.recv(65536)
        now = time.perf_counter()
        received += part
        if not first_s and b"data: " in received:
            first_s = now
        if not first_text_s and _TEXT.search(received):
            first_text_s = now
        is_stream = received.startswith(b"HTTP/1.1 200") or len(received) < 12
        if not part or not is_stream:
            raise RequestFailedError(bytes(received[:2000]).decode(errors="replace"))
    if not first_s:
        raise RequestFailedError("an answer without any event")
    return bytes(received), first_s, first_text_s


def parse_stream(received: bytes) -> tuple[str, dict[str, Any]]:
    """The text and the usage of a chunked stream of server-sent events.

    Raises:
        RequestFailedError: an event holds an error, or the usage is missing.
    """
    _, _, rest = received.partition(b"\r\n\r\n")
    body = bytearray()
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body += rest[:length]
        rest = rest[length + 2 :]
    texts: list[str] = []
    usage: dict[str, Any] = {}
    for line in body.decode().splitlines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise RequestFailedError(line)
        usage = event.get("usage") or usage
        texts += [choice["delta"].get("content") or "" for choice in event["choices"]]
    if not usage:
        raise RequestFailedError("an answer without usage")
    return "".join(texts), usage
