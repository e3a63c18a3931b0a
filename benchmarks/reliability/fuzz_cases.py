# SPDX-License-Identifier: Apache-2.0
"""All handwritten cases, and those that every endpoint gets."""

from __future__ import annotations

import json
from collections.abc import Iterator

from benchmarks.reliability import fuzz_cases_agents, fuzz_cases_chat, fuzz_cases_other
from benchmarks.reliability.fuzz_answers import Case
from benchmarks.reliability.fuzz_bodies import BASES, DROP, STREAMED, WEIRD, made

GET_PATHS = ("/v1/models", "/health", "/ping", "/version", "/load", "/v1/models/none", "/nothing")
ABSENT_PATHS = ("/inference/v1/generate", "/v1/embeddings", "/v1/chat/completions/render")


def handwritten() -> list[Case]:
    """Every case, in the order in which they are played."""
    return [
        *_raw_bodies(),
        *_paths(),
        *_types(),
        *_streams(),
        *fuzz_cases_chat.cases(),
        *fuzz_cases_other.cases(),
        *fuzz_cases_agents.cases(),
    ]


def _raw_bodies() -> Iterator[Case]:
    """What is no JSON object, or not said to be one."""
    for path, valid in BASES.items():
        whole = json.dumps(valid).encode()
        for name, raw in {
            "no body": b"",
            "cut off": whole[:-5],
            "an array": b"[" + whole + b"]",
            "null": b"null",
            "a text": b'"x"',
            "a number": b"7",
            "not UTF-8": whole[:-1] + b', "user": "\xff\xfe"}',
            "trailing": whole + b" x",
            "a key twice": whole[:-1] + b', "model": "other", "model": "tiny"}',
            "NaN": whole[:-1] + b', "temperature": NaN, "user": Infinity}',
            "BOM": b"\xef\xbb\xbf" + whole,
            "deep": whole[:-1] + b', "user": ' + b"[" * 3000 + b"]" * 3000 + b"}",
        }.items():
            yield Case(f"{path}: {name}", path, raw)
        yield Case(f"{path}: as text", path, valid, content_type="text/plain")
        yield Case(f"{path}: without a content type", path, valid, content_type=None)
        yield Case(f"{path}: as a form", path, valid, content_type="multipart/form-data")
        yield Case(f"{path}: GET", path, method="GET")


def _paths() -> Iterator[Case]:
    for path in GET_PATHS:
        yield Case(f"GET {path}", path, method="GET", content_type=None)
    for path in (*ABSENT_PATHS, "/v1/models", "/invocations", "/v1/chat/completions/"):
        yield Case(f"POST {path}", path, {"model": "tiny", "prompt": "x", "max_tokens": 2})
    batch = {"model": "tiny", "messages": [[{"role": "user", "content": "x"}]], "max_tokens": 2}
    yield Case("a batch of chats", "/v1/chat/completions/batch", {**batch, "temperature": 0})
    yield Case("an empty batch", "/v1/chat/completions/batch", {**batch, "messages": []})
    scored = {"model": "tiny", "query": "x", "items": ["a", "b"], "label_token_ids": [1, 2]}
    yield Case("scores", "/generative_scoring", scored)
    yield Case("a response that is not there", "/v1/responses/resp_none", method="GET")
    yield Case("cancel what is not there", "/v1/responses/resp_none/cancel", b"")


def _types() -> Iterator[Case]:
    """Each top-level field of a valid request with values of all types, and without it."""
    for path, valid in BASES.items():
        for key in valid:
            yield made(path, f"no {key}", **{key: DROP})
            for name, value in WEIRD.items():
                yield made(path, f"{key} {name}", **{key: value})
        yield made(path, "an unknown key", nobody_knows_this=1)


def _streams() -> Iterator[Case]:
    for path in STREAMED:
        yield made(path, "stream", stream=True)
        yield made(path, "stream null", stream=None)
        yield made(path, "stream yes", stream="yes")
        for options in ({"include_usage": True}, {"continuous_usage_stats": True}, {}, None, 1):
            yield made(path, f"stream with {options}", stream=True, stream_options=options)
        yield made(path, "stream options alone", stream_options={"include_usage": True})
        yield made(path, "stream of a wrong request", stream=True, top_k=-7)
