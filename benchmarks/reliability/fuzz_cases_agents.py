# SPDX-License-Identifier: Apache-2.0
"""Cases of agents: session headers, cache_control everywhere, long conversations, later turns."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

from benchmarks.reliability.fuzz_answers import Case
from benchmarks.reliability.fuzz_bodies import (
    ANTHROPIC_TOOL,
    BASES,
    CHAT,
    CHAT_BODY,
    EMOJI,
    MESSAGES,
    RESPONSES,
    RESPONSES_BODY,
    SPECIAL,
    STREAMED,
    SURROGATE,
    TEXT,
    TOOL,
    Json,
    body,
    call,
    conversation,
    made,
    user,
)

SESSION_HEADERS = (
    "X-Session-ID",
    "X-Parent-Session-ID",
    "x-claude-code-session-id",
    "thread-id",
    "session-id",
    "x-codex-turn-metadata",
    "x-opencode-session",
    "x-deepseek-harness-session-id",
    "x-deepseek-harness-compact",
    "x-dynamo-session-id",
    "x-dynamo-session-final",
    "x-multi-turn-session-id",
    "x-litellm-session-id",
    "Authorization",
    "x-api-key",
    "Cache-Control",
    "X-data-parallel-rank",
    "X-Request-Id",
)
COOKIE = base64.b64encode(b"10.0.0.1:8000")
VALUES: dict[str, str | bytes] = {
    "empty": "",
    "valid": "0b7f2c2e-6d0e-4d27-9f2c-30a3f6d8f001",
    "long": "k" * 10_000,
    "control": b"abc\x01\x7fdefgh",
    "NUL": b"abc\x00defgh",
    "latin": b"\xe9\xff\xfe-session-id",
    "UTF-8": EMOJI.encode(),
    "cookie": COOKIE,
    "JSON": b'{"request_kind": "compaction", "session_id": ["x"]}',
    "deep JSON": b"[" * 5000,
    "true": "true",
    "blanks": "   \t ",
    "bearer": "Bearer ",
    "commas": "no-store, max-age=0,,;=",
}
SHORT = ("X-Session-ID", "session-id", "Authorization")


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _headers()
    yield from _cache_control()
    yield from _long_conversations()
    yield from _later_turns()


def _headers() -> Iterator[Case]:
    for header in SESSION_HEADERS:
        for name, value in VALUES.items():
            yield Case(f"{header} {name}", CHAT, CHAT_BODY, ((header, value),))
    for path in STREAMED[1:]:
        for header in SHORT:
            for name in ("empty", "valid", "long", "latin", "cookie"):
                headers = ((header, VALUES[name]),)
                yield Case(f"{path}: {header} {name}", path, BASES[path], headers)
    twice = (("X-Session-ID", "first-session"), ("X-Session-ID", "other-session"))
    yield Case("a header twice", CHAT, CHAT_BODY, twice)
    everything = tuple((header, VALUES["valid"]) for header in SESSION_HEADERS[:12])
    yield Case("all headers", CHAT, CHAT_BODY, everything)
    final = (("x-dynamo-session-id", "session-of-dynamo"), ("x-dynamo-session-final", "true"))
    yield Case("the last turn", CHAT, CHAT_BODY, final)


def _cache_control() -> Iterator[Case]:
    for control in ({"type": "ephemeral", "ttl": "1h"}, {"type": 3}, None, [], "x"):
        mark = {"cache_control": control}
        text = {"type": "text", "text": TEXT, **mark}
        name = f"cache_control {json.dumps(control)}"
        chat = [{"role": "system", "content": [text], **mark}, user([text], **mark)]
        function = {**TOOL["function"], **mark}
        tools: list[Json] = [{**TOOL, "function": function, **mark}]
        yield made(CHAT, f"{name} everywhere", messages=chat, tools=tools, **mark)
        result = {"type": "tool_result", "tool_use_id": "t", "content": [text], **mark}
        more: Json = {"system": [text], "tools": [{**ANTHROPIC_TOOL, **mark}], **mark}
        for stream in (False, True):
            blocks = [user([text, result])]
            yield made(MESSAGES, f"{name}, {stream}", messages=blocks, stream=stream, **more)
        item = {"role": "user", "content": [{**text, "type": "input_text"}], **mark}
        yield made(RESPONSES, f"{name} everywhere", input=[item], **mark)


def _odd_messages() -> dict[str, Json]:
    return {
        "nothing": {},
        "null": None,
        "a text": "x",
        "without content": {"role": "user"},
        "without role": {"content": "x"},
        "unknown role": {"role": "critic", "content": "x"},
        "role list": {"role": ["user"], "content": "x"},
        "content number": {"role": "user", "content": 3},
        "content null": {"role": "user", "content": None},
        "content parts": {"role": "user", "content": [{"type": "text", "text": "x"}]},
        "content of nothing": {"role": "user", "content": []},
        "content broken": {"role": "user", "content": [{"type": "text"}]},
        "an image": user([{"type": "image_url", "image_url": {"url": "x"}}]),
        "a surrogate": user(SURROGATE),
        "special tokens": user(SPECIAL),
        "a name": user("x", name="Bob"),
        "a name null": user("x", name=None),
        "more keys": user("x", other=[1]),
        "developer": {"role": "developer", "content": "x"},
        "system": {"role": "system", "content": "x"},
        "a call broken": _calling({**call(), "function": {"name": "f"}}),
        "a call with arguments broken": _calling(call(arguments="{")),
        "a call with an object": _calling(call(arguments={"a": 1})),
        "a call with more keys": _calling({**call(), "index": 0}),
        "no calls": {"role": "assistant", "content": "x", "tool_calls": []},
        "calls null": {"role": "assistant", "content": "x", "tool_calls": None},
        "an answer of nothing": {"role": "assistant"},
        "an answer null": {"role": "assistant", "content": None},
        "an answer in parts": {"role": "assistant", "content": [{"type": "text", "text": "x"}]},
        "reasoning": {"role": "assistant", "content": "x", "reasoning": "r"},
        "a refusal": {"role": "assistant", "refusal": "no"},
        "a result without id": {"role": "tool", "content": "x"},
        "a result with id null": {"role": "tool", "content": "x", "tool_call_id": None},
        "a result in parts": {
            "role": "tool",
            "tool_call_id": "c",
            "content": [{"type": "text", "text": "x"}],
        },
        "a function's": {"role": "function", "name": "f", "content": "x"},
    }


def _calling(made_call: Json) -> Json:
    return {"role": "assistant", "content": None, "tool_calls": [made_call]}


def _long_conversations() -> Iterator[Case]:
    """Long enough that the plugin validates plain messages itself, with one that is not plain."""
    for number, (name, odd) in enumerate(_odd_messages().items()):
        messages = conversation(20 + number % 21, "odd")
        for where in (0, len(messages) // 2, len(messages) - 1):
            changed = [*messages[:where], odd, *messages[where:]]
            yield made(CHAT, f"{len(messages)} messages, {name} at {where}", messages=changed)
        last = [*messages, odd]
        yield made(CHAT, f"{len(messages)} messages, {name} last", messages=last, stream=True)
    for length in (15, 16, 17, 40):
        messages = conversation(length, "length")
        yield made(CHAT, f"{length} messages", messages=messages, tools=[TOOL])
        wrong = {"messages": messages, "temperature": "hot", "n": [], "tools": 3}
        yield made(CHAT, f"{length} messages, other fields wrong", **wrong)
        yield made(CHAT, f"{length} messages, no model", **{**wrong, "model": None, "n": 1})
        later = {"continue_final_message": True, "add_generation_prompt": False}
        answered = [*messages, {"role": "assistant", "content": "It"}]
        yield made(CHAT, f"{length} messages, continued", messages=answered, **later)
        yield Case(f"tokenize {length} messages", "/tokenize", {"messages": messages})
    yield made(CHAT, "too many messages", messages=conversation(400))


def _later_turns() -> Iterator[Case]:
    def chat_then(sent: Json, answer: Json) -> Json:
        message = answer["choices"][0]["message"]
        kept = {key: message[key] for key in ("role", "content") if key in message}
        if message.get("tool_calls"):
            kept["tool_calls"] = message["tool_calls"]
        return {**sent, "messages": [*sent["messages"], kept, user(f"And then? {EMOJI}")]}

    def edited(sent: Json, answer: Json) -> Json:
        later = chat_then(sent, answer)
        return {**later, "messages": [*later["messages"][:-3], user("edited"), user("y")]}

    def anthropic_then(sent: Json, answer: Json) -> Json:
        kept = {"role": "assistant", "content": answer["content"]}
        return {**sent, "messages": [*sent["messages"], kept, user("And then?")]}

    def responses_then(sent: Json, answer: Json) -> Json:
        return {**sent, "input": "And then?", "previous_response_id": answer["id"]}

    for then in (chat_then, edited):
        for length in (2, 5, 16, 33):
            messages = conversation(length, f"{then.__name__} {length}")
            for more in ({}, {"tools": [TOOL], "tool_choice": "required", "max_tokens": 15}):
                for headers in ((), (("X-Session-ID", f"session-{length}-{then.__name__}"),)):
                    sent = body(CHAT_BODY, messages=messages, **more)
                    name = f"turn after {length} messages, {then.__name__}, {len(more)} options"
                    yield Case(f"{name}, {len(headers)} headers", CHAT, sent, headers, then=then)
    yield Case("a turn of messages", MESSAGES, BASES[MESSAGES], then=anthropic_then)
    stored = body(RESPONSES_BODY, store=True)
    yield Case("a turn of responses", RESPONSES, stored, then=responses_then)
