# SPDX-License-Identifier: Apache-2.0
"""Cases of /v1/chat/completions: messages, tools, sampling, formats, templates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.reliability.fuzz_answers import Case
from benchmarks.reliability.fuzz_bodies import (
    CHAT,
    EMOJI,
    NUL,
    SCHEMA,
    SPECIAL,
    SURROGATE,
    TEXT,
    TOOL,
    WEIRD,
    Json,
    call,
    json_format,
    made,
    user,
)

PART = {"type": "text", "text": "Hello"}
AGAIN = {"role": "assistant", "content": "Well, "}

CONTENTS: dict[str, Json] = {
    "parts": [PART, PART],
    "a part of text": ["Hello", PART],
    "a part null": [None],
    "a part number": [3],
    "a part list": [[PART]],
    "a part without type": [{"text": "x"}],
    "a part of unknown type": [{"type": "video_dance", "text": "x"}],
    "a part without text": [{"type": "text"}],
    "a part with text null": [{"type": "text", "text": None}],
    "a part with text list": [{"type": "text", "text": ["x"]}],
    "an image": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
    "an image null": [{"type": "image_url", "image_url": None}],
    "a part with more keys": [{**PART, "cache_control": {"type": "ephemeral"}, "x": 1}],
    "a refusal": [{"type": "refusal", "refusal": "no"}],
    "long": TEXT * 1500,
    "somewhat long": TEXT * 100,
    "surrogate": SURROGATE,
    "surrogate alone": "\udfff",
    "NUL": NUL,
    "emoji": EMOJI,
    "special tokens": SPECIAL,
    "blanks": " \n\t ",
    "controls": "\x01\x1b[0m\x7f\u2028\ufeff",
    "parts with a surrogate": [{"type": "text", "text": SURROGATE}],
}


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _messages()
    yield from _tools()
    yield from _sampling()
    yield from _formats()
    yield from _templates()


def _with(name: str, *messages: Json, **more: Json) -> Case:
    return made(CHAT, name, messages=list(messages), **more)


def _messages() -> Iterator[Case]:
    for name, content in {**CONTENTS, **WEIRD}.items():
        yield _with(f"content {name}", user("x"), user(content))
    for role in ("user", "system", "developer", "assistant", "tool", "function", "critic"):
        yield _with(f"role {role}", user("x"), {"role": role, "content": TEXT})
    for name, role in WEIRD.items():
        yield _with(f"role is {name}", {"role": role, "content": "x"})
    yield _with("a message without role", {"content": "x"})
    yield _with("a message without content", {"role": "user"})
    yield _with("a message of another type", "x", None, 3)
    yield _with("system last", user("x"), {"role": "system", "content": "y"})
    yield _with("only an answer", {"role": "assistant", "content": "y"})
    yield _with("two answers", user("x"), AGAIN, AGAIN)
    yield _with("a message with a name", user("x", name="Bob"))
    yield _with("a message with more keys", user("x", nobody=1, cache_control={"type": "x"}))
    yield _with("reasoning", user("x"), {**AGAIN, "reasoning": "r"}, user("y"))
    yield _with("reasoning_content", user("x"), {**AGAIN, "reasoning_content": "r"}, user("y"))
    yield _with("an answer of nothing", user("x"), {"role": "assistant"}, user("y"))


def _tools() -> Iterator[Case]:
    function = TOOL["function"]
    for name, tools in {
        "one": [TOOL],
        "the same twice": [TOOL, TOOL],
        "without a name": [{"type": "function", "function": {"parameters": {}}}],
        "name null": [{"type": "function", "function": {"name": None}}],
        "name empty": [{"type": "function", "function": {"name": ""}}],
        "without function": [{"type": "function"}],
        "without type": [{"function": function}],
        "of another type": [{**TOOL, "type": "web_search"}],
        "without parameters": [{"type": "function", "function": {"name": "f"}}],
        "parameters null": [{"type": "function", "function": {"name": "f", "parameters": None}}],
        "parameters text": [{"type": "function", "function": {"name": "f", "parameters": "x"}}],
        "broken schema": [_tool({"type": "objekt", "properties": 3})],
        "broken reference": [_tool({"$ref": "#/$defs/none"})],
        "broken pattern": [_tool({"type": "object", "properties": {"a": {"pattern": "("}}})],
        "recursive": [_tool({"type": "object", "properties": {"a": {"$ref": "#"}}})],
        "surrogates": [_tool({"type": "object", "description": SURROGATE})],
        "controls": [{"type": "function", "cache_control": 3, "function": function}],
        "strict": [{"type": "function", "function": {**function, "strict": True}}],
    }.items():
        for choice in ("auto", "required"):
            yield _with(f"tools {name}, {choice}", user("x"), tools=tools, tool_choice=choice)
    for depth in (50, 190, 240, 400, 900, 960, 975, 985):
        yield _deep(depth)
    named = {"type": "function", "function": {"name": "get_weather"}}
    unknown = {"type": "function", "function": {"name": "nobody"}}
    choices = [named, unknown, {"type": "function"}, {"type": "auto"}, "none", "any", {}]
    for choice in (*choices, None, 3, []):
        for tools in ([TOOL], []):
            more = {"tools": tools, "tool_choice": choice, "max_tokens": 12}
            yield _with(f"choice {choice} of {len(tools)}", user("x"), **more)
            yield _with(f"choice {choice} of {len(tools)}, stream", user("x"), **more, stream=True)
    yield _with("choice without tools", user("x"), tool_choice="auto")
    for value in (True, False, None, "no", 3):
        more = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": value}
        yield _with(f"parallel calls {value}", user("x"), **more, max_tokens=15)
    yield from _tool_messages()


def _deep(depth: int) -> Case:
    """Made as text: the encoder's own depth is limited."""
    case = made(CHAT, f"tools {depth} deep", messages=[user("x")], tools=[_tool("HERE")])
    nested = b'{"p": ' * depth + b"{}" + b"}" * depth
    return replace(case, body=json.dumps(case.body).encode().replace(b'"HERE"', nested))


def _tool(schema: Json) -> Json:
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


def _tool_messages() -> Iterator[Case]:
    result = {"role": "tool", "tool_call_id": "call_1", "content": "21"}
    for name, calls in {
        "one": [call()],
        "none": [],
        "null": None,
        "a text": "x",
        "without id": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
        "id null": [{**call(), "id": None}],
        "without type": [{key: call()[key] for key in ("id", "function")}],
        "without function": [{"id": "c", "type": "function"}],
        "without name": [{**call(), "function": {"arguments": "{}"}}],
        "without arguments": [{**call(), "function": {"name": "f"}}],
        "arguments object": [call(arguments={"a": 1})],
        "arguments null": [call(arguments=None)],
        "arguments empty": [call(arguments="")],
        "arguments broken": [call(arguments='{"a": ')],
        "arguments a list": [call(arguments="[1]")],
        "arguments text": [call(arguments='"x"')],
        "arguments surrogate": [call(arguments='{"a": "\\ud800"}')],
        "more keys": [{**call(), "index": 0}],
        "a custom tool": [{"id": "c", "type": "custom", "custom": {"name": "f", "input": "x"}}],
    }.items():
        asked = {"role": "assistant", "content": None, "tool_calls": calls}
        yield _with(f"calls {name}", user("x"), asked, result, tools=[TOOL])
    for name, message in {
        "without id": {"role": "tool", "content": "21"},
        "id null": {**result, "tool_call_id": None},
        "id number": {**result, "tool_call_id": 3},
        "parts": {**result, "content": [PART]},
        "content null": {**result, "content": None},
        "of nobody": {**result, "tool_call_id": "nobody"},
    }.items():
        asked = {"role": "assistant", "tool_calls": [call()]}
        yield _with(f"result {name}", user("x"), asked, message)
        yield _with(f"result {name}, first", message, user("x"))


def _sampling() -> Iterator[Case]:
    values: dict[str, list[Json]] = {
        "n": [0, 1, 3, -1, None, "2", 1.5],
        "max_tokens": [0, -1, 1, 100000, 10**20, None, 1.5, "4"],
        "max_completion_tokens": [0, -1, 3, 100000, None],
        "min_tokens": [0, 3, 9, -1],
        "stop": ["", "e", [], [""], ["日本", "e"], [3], 3, None, "e" * 5000, ["x"] * 100],
        "stop_token_ids": [[], [-1], [10**9], ["x"], [2, 3], None],
        "logprobs": [True, False, None, 3, "x"],
        "top_logprobs": [0, 2, -1, 1000],
        "prompt_logprobs": [0, 1, -1, -2, 1000, True],
        "echo": [True, None],
        "seed": [0, -1, 2**63, 2**64, "x", None],
        "temperature": [0, -1, 1e-9, 3, "0", None],
        "top_p": [0, 0.5, 1, 2, -1],
        "top_k": [0, -1, 1, -5, 10**9],
        "min_p": [0, 0.5, 2],
        "repetition_penalty": [0, 1.1, -1, 1e30],
        "presence_penalty": [0, 1, 5],
        "logit_bias": [{}, {"3": 100}, {"-1": 1}, {"999999": 1}, {"x": 1}, {"3": None}, []],
        "allowed_token_ids": [[], [3, 4], [-1], [10**8], None],
        "bad_words": [[], ["e"], [""], [None], "x"],
        "ignore_eos": [True, "x"],
        "truncate_prompt_tokens": [0, 1, 5, -1, -2, 5000],
        "priority": [0, 1, -1, "x", 2**40, None],
        "user": ["bob", "", 3, None],
        "service_tier": ["auto", 3],
        "return_token_ids": [True],
        "return_tokens_as_token_ids": [True],
        "use_beam_search": [True],
        "add_special_tokens": [True, False],
        "skip_special_tokens": [False],
        "request_id": ["", "x y", 3, SURROGATE],
        "model": ["other", "tiny/", 3],
        "vllm_xargs": [{}, {"a": 1}, {"a": {"b": 1}}, [], "x"],
        "kv_transfer_params": [{}, {"do_remote_prefill": False}, 3],
        "functions": [[], [TOOL["function"]]],
        "function_call": ["auto", {"name": "get_weather"}],
        "store": [True],
        "stream_interval": [0, 1, 3],
    }
    for key, each in values.items():
        for value in each:
            yield made(CHAT, f"{key}={str(value)[:40]}", **{key: value})
    yield made(CHAT, "top_logprobs", logprobs=True, top_logprobs=3)
    yield made(CHAT, "top_logprobs, stream", logprobs=True, top_logprobs=3, stream=True)
    yield made(CHAT, "n=3 with a seed", n=3, seed=7, temperature=1)
    yield made(CHAT, "n=3 with a seed, stream", n=3, seed=7, temperature=1, stream=True)
    yield made(CHAT, "a seed", seed=7, temperature=1)


def _formats() -> Iterator[Case]:
    formats = [{"type": "text"}, {"type": "json_object"}, json_format(), {"type": "json_schema"}]
    formats += [{"type": "yaml"}, {}, None, "json", json_format({"type": "objekt"})]
    formats += [json_format(None), json_format({}), json_format({"$ref": "#/none"})]
    formats += [{"type": "json_schema", "json_schema": {"schema": SCHEMA}}]
    for number, each in enumerate(formats):
        yield made(CHAT, f"response_format {number}", response_format=each, max_tokens=12)
    structured: list[Json] = [
        {"json": SCHEMA},
        {"json": "{"},
        {"json": 3},
        {"regex": "[ab]{3}"},
        {"regex": "("},
        {"choice": ["yes", "no"]},
        {"choice": []},
        {"choice": [1]},
        {"grammar": 'root ::= "a" | "b"'},
        {"grammar": "root"},
        {"json_object": True},
        {"regex": "a", "choice": ["b"]},
        {"structural_tag": "{}"},
        {},
        None,
    ]
    for number, each in enumerate(structured):
        yield made(CHAT, f"structured_outputs {number}", structured_outputs=each, max_tokens=12)


def _templates() -> Iterator[Case]:
    for asks in (True, False):
        for continues in (True, False):
            for last in (user("y"), AGAIN, {**AGAIN, "content": [PART]}, {**AGAIN, "content": ""}):
                name = f"add {asks}, continue {continues}, {last['role']} {last['content']}"
                more = {"add_generation_prompt": asks, "continue_final_message": continues}
                yield _with(name, user("x"), last, **more)
    kwargs = [{}, {"enable_thinking": False}, {"messages": []}, {"tools": [1]}, {"x": {"y": [1]}}]
    kwargs += [{"tokenize": True}, {"chat_template": "x"}, {"add_generation_prompt": False}]
    for each in (*kwargs, {"continue_final_message": True}, {"x" * 5000: 1}, None, [], "x"):
        yield made(CHAT, f"template kwargs {str(each)[:40]}", chat_template_kwargs=each)
    for template in ("", "x", "{% if %}", "{{ messages[99].content }}", 3):
        yield made(CHAT, f"template {template}", chat_template=template)
    for each in (None, [], [{"title": "a", "text": "b"}], [{"title": 3}], "x"):
        yield made(CHAT, f"documents {each}", documents=each)
