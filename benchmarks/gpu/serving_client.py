# SPDX-License-Identifier: Apache-2.0
"""One streamed chat request under a deadline, with the moment at which each piece of text came."""

from __future__ import annotations

import re
import socket
import time
from dataclasses import dataclass

from benchmarks.serving.client import RequestFailedError, parse_stream

HOST = "127.0.0.1"
_END_OF_STREAM = b"\r\n0\r\n\r\n"
_TEXT = re.compile(rb'"content":"[^"]')


class TimeIsUpError(RuntimeError):
    """The deadline came before the end of the answer."""


@dataclass(frozen=True)
class Answer:
    """What came, and when, in seconds since the request was sent.

    Attributes:
        first_s: The first text.
        text_s: Each event with text, the first one too. With drafts one holds several tokens.
    """

    first_s: float
    end_s: float
    text_s: tuple[float, ...]
    text: str
    num_prompt: int
    num_cached: int
    num_made: int


def ask(port: int, body: bytes, until: float) -> Answer:
    """Send one request and read the whole answer.

    Args:
        port: of a server on this machine.
        until: By `time.monotonic`.

    Raises:
        TimeIsUpError: the deadline came first; vLLM ends a request whose client has gone.
        RequestFailedError: the server answered with an error, or closed the connection.
        OSError: there is no connection.
    """
    request = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    try:
        with socket.create_connection((HOST, port), timeout=_left(until)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sent = time.perf_counter()
            connection.sendall(request)
            received, text_s, end_s = _receive(connection, sent, until)
    except TimeoutError as error:
        raise TimeIsUpError("no answer in time") from error
    text, usage = parse_stream(received)
    details = usage.get("prompt_tokens_details") or {}
    return Answer(
        text_s[0] if text_s else end_s,
        end_s,
        tuple(text_s),
        text,
        usage["prompt_tokens"],
        details.get("cached_tokens") or 0,
        usage["completion_tokens"],
    )


def _left(until: float) -> float:
    """Seconds to the deadline, for a socket that wants some."""
    return max(0.01, until - time.monotonic())


def _receive(
    connection: socket.socket, sent: float, until: float
) -> tuple[bytes, list[float], float]:
    """The raw answer, when its texts came, and when its end."""
    received, seen = bytearray(), 0
    text_s: list[float] = []
    while True:
        connection.settimeout(_left(until))
        part = connection.recv(65536)
        now = time.perf_counter() - sent
        received += part
        if not part or (len(received) >= 12 and not received.startswith(b"HTTP/1.1 200")):
            raise RequestFailedError(bytes(received[:2000]).decode(errors="replace"))
        while found := _TEXT.search(received, seen):
            text_s.append(now)
            seen = found.end()
        if received.endswith(_END_OF_STREAM):
            return bytes(received), text_s, now
