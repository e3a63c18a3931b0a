# SPDX-License-Identifier: Apache-2.0
"""The client of benchmarks.gpu.serving against a server that is a few lines."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.gpu.serving_client import HOST, TimeIsUpError, ask
from benchmarks.serving.client import RequestFailedError

OK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def event(**fields: Any) -> bytes:
    data = b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


def said(text: str) -> bytes:
    return event(choices=[{"delta": {"content": text}}])


USAGE = event(
    choices=[],
    usage={
        "prompt_tokens": 9,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 4},
    },
)


def served(parts: list[bytes]) -> Iterator[int]:
    """A port where these come, 20 ms apart; the connection stays open behind them."""
    with socket.create_server((HOST, 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                for part in parts:
                    connection.sendall(part)
                    time.sleep(0.02)
                connection.recv(65536)

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]


def test_every_text_has_its_moment() -> None:
    first, second = said("one"), said("two")
    parts = [OK + said(""), first[:30], first[30:], second + said("three") + USAGE + END]
    for port in served(parts):
        found = ask(port, b"{}", time.monotonic() + 5)
        assert (found.text, found.num_prompt, found.num_cached, found.num_made) == (
            "onetwothree",
            9,
            4,
            3,
        )
        one, two, three = found.text_s
        assert 0.02 < found.first_s == one < two == three <= found.end_s


def test_a_deadline_is_kept() -> None:
    for port in served([OK + said("one")]):
        began = time.monotonic()
        with pytest.raises(TimeIsUpError):
            ask(port, b"{}", began + 0.3)
        assert time.monotonic() - began < 1


def test_an_error_is_one() -> None:
    for port in served([b"HTTP/1.1 400 Bad Request\r\n\r\nno such thing"]):
        with pytest.raises(RequestFailedError, match="no such thing"):
            ask(port, b"{}", time.monotonic() + 5)
