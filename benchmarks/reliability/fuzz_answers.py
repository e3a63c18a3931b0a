# SPDX-License-Identifier: Apache-2.0
"""One HTTP request to one server, and its answer in a form that can be compared.

`ALLOWED` lists what may differ between the sides, and why. Everything else is a difference.
"""

from __future__ import annotations

import http.client
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SECONDS = 60
"""A request that takes longer has no answer."""

ALLOWED: dict[str, str] = {
    "usage.prompt_tokens_details": "the plugin reports it by default, and reuses more tokens",
    "usage.input_tokens_details": "the same figure of /v1/responses",
    "usage.cache_creation": "Anthropic's breakdown, which stock vLLM does not have",
    "usage.cache_read_input_tokens": "counted into input_tokens: the plugin reuses more tokens",
    "usage.cache_creation_input_tokens": "counted into input_tokens",
    "system_fingerprint": "vLLM's hash of the server's configuration, of which drafts are a part; "
    "the version before it is compared",
}
"""Fields, and the reason for which they are left out."""

_CACHE_SPLIT = ("cache_read_input_tokens", "cache_creation_input_tokens")
_IDS = frozenset({"id", "request_id", "item_id", "response_id", "call_id", "tool_call_id"})
_TIMES = frozenset({"created", "created_at", "completed_at", "sequence_number"})
_ID_IN_TEXT = re.compile(
    r"\b(chatcmpl|cmpl|resp|msg|call|fc|rs|chatcmpl-tool|generate-tokens|tokenize|tokn|detok)"
    r"[-_][0-9a-zA-Z-]{8,}|0x[0-9a-f]{8,}"
)
_CONFIGURATION = re.compile(r"-[0-9a-f]{8}$")
"""The end of a fingerprint."""
_JOINED = frozenset(
    {"content", "text", "reasoning", "reasoning_content", "arguments", "delta", "partial_json"}
)
"""Texts that a stream sends in parts."""

Json = Any


@dataclass(frozen=True)
class Request:
    """What is sent; `headers` may hold anything that fits in a line."""

    path: str
    body: bytes = b""
    headers: tuple[tuple[str, str | bytes], ...] = ()
    method: str = "POST"


@dataclass(frozen=True)
class Case:
    """A request that is sent to both sides.

    Attributes:
        body: JSON, or the bytes themselves.
        headers: beside the content type.
        then: makes the body of a second turn of a side's answer to the first.
    """

    name: str
    path: str
    body: Json = b""
    headers: tuple[tuple[str, str | bytes], ...] = ()
    method: str = "POST"
    content_type: str | None = "application/json"
    then: Callable[[Json, Json], Json] | None = field(default=None, compare=False)

    def request(self, *more: tuple[str, str]) -> Request:
        """As it goes out."""
        return self.with_body(self.body, *more)

    def with_body(self, body: Json, *more: tuple[str, str]) -> Request:
        """The same with another body."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = (("Content-Type", self.content_type),) if self.content_type else ()
        return Request(self.path, raw, (*kind, *self.headers, *more), self.method)


@dataclass(frozen=True)
class Answer:
    """What came back. Status 0: nothing did, and `content` says why."""

    status: int
    content: Json
    raw: bytes = field(default=b"", compare=False, repr=False)

    def as_json(self) -> dict[str, Json]:
        """For a report."""
        return {"status": self.status, "content": self.content}


_LONE = re.compile(rb'"(request_id|session_id)": *"[^"]*((?<!\\)\\u[dD][89a-fA-F]|\xed[\xa0-\xbf])')

ALLOWED_CASES: dict[str, Callable[[Request, Answer, Answer], bool]] = {
    "an id with a lone surrogate cannot be sent to the engine: stock vLLM answers 500 without a "
    "message. The plugin takes such a session id for none, and may answer from memory": (
        lambda sent, stock, plugin: (
            bool(_LONE.search(sent.body)) and stock.status == 500 and plugin.status in (200, 400)
        )
    ),
}
"""Whole answers that may differ, by the reason."""


def ask(port: int, request: Request) -> Answer:
    """Send a request to a server of this machine, over a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.putrequest(request.method, request.path)
        for name, value in request.headers:
            connection.putheader(name, value)
        if request.body or request.method == "POST":
            connection.putheader("Content-Length", str(len(request.body)))
        connection.endheaders(request.body or None)
        response = connection.getresponse()
        raw, kind = response.read(), response.headers.get_content_type()
    except (OSError, http.client.HTTPException) as error:
        return Answer(0, type(error).__name__)
    finally:
        connection.close()
    return Answer(response.status, _content(raw, kind), raw)


def is_same(one: Json, other: Json) -> bool:
    """Whether two contents are equal; numbers with a fraction within what float32 leaves open."""
    if isinstance(one, float) and isinstance(other, float):
        both_nan = math.isnan(one) and math.isnan(other)
        return both_nan or math.isclose(one, other, rel_tol=2e-3, abs_tol=2e-3)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return type(one) is type(other) and one == other


def places(one: Json, other: Json, path: str = "") -> list[str]:
    """Where two contents differ: a path and both values, shortened."""
    if is_same(one, other):
        return []
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(one.keys() | other.keys())
        pairs = [(f"{path}.{key}", one.get(key, "-"), other.get(key, "-")) for key in keys]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [
            (f"{path}[{number}]", *pair) for number, pair in enumerate(zip(one, other, strict=True))
        ]
    else:
        return [f"{path}: {str(one)[:300]!a} against {str(other)[:300]!a}"]
    return [place for key, *pair in pairs for place in places(*pair, key)]


def same_answers(one: Answer, other: Answer) -> bool:
    """Whether two sides answered the same."""
    return one.status == other.status and is_same(one.content, other.content)


def is_allowed(sent: Request, stock: Answer, plugin: Answer) -> bool:
    """Whether `ALLOWED_CASES` has this difference."""
    return any(holds(sent, stock, plugin) for holds in ALLOWED_CASES.values())


def _content(raw: bytes, kind: str) -> Json:
    if kind == "text/event-stream":
        return _stream(raw.decode("utf-8", "replace"))
    try:
        return _clean(json.loads(raw))
    except ValueError:
        return _ID_IN_TEXT.sub("ID", raw.decode("utf-8", "replace"))


def _clean(content: Json) -> Json:
    """Without ids, times and what `ALLOWED` lists."""
    if isinstance(content, list):
        return [_clean(each) for each in content]
    if isinstance(content, str):
        return _ID_IN_TEXT.sub("ID", content)
    if not isinstance(content, dict):
        return content
    made = {}
    for key, value in content.items():
        if key in _TIMES:
            continue
        if key in _IDS and isinstance(value, str):
            value = "ID"
        if key == "system_fingerprint" and isinstance(value, str):
            value = _CONFIGURATION.sub("-HASH", value)
        if key == "rank" and isinstance(value, int):
            value = float(value)  # of a log probability, so it is as exact as that
        made[key] = _usage(value) if key == "usage" else _clean(value)
    return made


def _usage(usage: Json) -> Json:
    if not isinstance(usage, dict):
        return usage
    left = {key: value for key, value in usage.items() if f"usage.{key}" not in ALLOWED}
    if "input_tokens" in left:
        left["input_tokens"] += sum(usage.get(key) or 0 for key in _CACHE_SPLIT)
    return left


def _stream(text: str) -> Json:
    """The events of a stream, parts of one text joined; chunks of a completion as one answer."""
    whole: dict[str, Json] = {}
    events: list[Json] = []
    for block in re.split(r"\r?\n\r?\n", text):
        lines = [line for line in block.splitlines() if line.startswith("data:")]
        if not lines:
            continue
        data = "\n".join(line.removeprefix("data:").strip() for line in lines)
        try:
            event = _clean(json.loads(data))
        except ValueError:
            events.append(data)
            continue
        if isinstance(event, dict) and "choices" in event:
            _merge(whole, event)
        elif _continues(event, events):
            _merge(events[-1], event)
        else:
            events.append(event)
    return {"whole": whole, "events": events}


def _continues(event: Json, events: list[Json]) -> bool:
    if not events or not isinstance(event, dict) or not isinstance(events[-1], dict):
        return False
    kind = event.get("type")
    places = ("type", "index", "output_index", "content_index")
    same_place = all(event.get(key) == events[-1].get(key) for key in places)
    return isinstance(kind, str) and "delta" in kind and same_place


def _merge(whole: dict[str, Json], part: dict[str, Json]) -> None:
    """Add one part of a stream to those before it."""
    for key, value in part.items():
        known = whole.get(key)
        if isinstance(value, dict):
            if not isinstance(known, dict):
                known = whole[key] = {}
            _merge(known, value)
        elif isinstance(value, list) and key in ("choices", "tool_calls"):
            _merge_numbered(whole.setdefault(key, {}), value)
        elif isinstance(value, list):
            whole[key] = (known or []) + value
        elif key in _JOINED and isinstance(value, str):
            whole[key] = (known or "") + value
        elif value is not None or key not in whole:
            whole[key] = value


def _merge_numbered(whole: Json, parts: list[Json]) -> None:
    for number, part in enumerate(parts):
        _merge(whole.setdefault(str(part.get("index", number)), {}), part)
