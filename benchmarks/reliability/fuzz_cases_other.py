# SPDX-License-Identifier: Apache-2.0
"""Cases of completions, responses, Anthropic messages, tokenize and detokenize."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.reliability.fuzz_answers import Case
from benchmarks.reliability.fuzz_bodies import (
    ANTHROPIC_TOOL,
    COMPLETIONS,
    COUNT_TOKENS,
    DETOKENIZE,
    DROP,
    EMOJI,
    FLAT_TOOL,
    MESSAGES,
    NUL,
    RESPONSES,
    SCHEMA,
    SPECIAL,
    STREAMED,
    SURROGATE,
    TEXT,
    TOKENIZE,
    WEIRD,
    Json,
    anthropic_tools,
    claude_metadata,
    made,
    response_items,
    user,
)

TEXTS = {"surrogate": SURROGATE, "NUL": NUL, "emoji": EMOJI, "special": SPECIAL, "": ""}


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _completions()
    yield from _responses()
    yield from _messages()
    yield from _tokens()
    yield from _fields()


def _completions() -> Iterator[Case]:
    prompts: list[Json] = [[], [1, 2, 3], [[1, 2], [3]], [[]], [10**9], [-1], [49151], [49152]]
    prompts += [[1] * 2047, [1] * 2048, [1] * 3000, [1.5], [True], [1, "x"], ["x", [1]], [None]]
    prompts += ["", " ", ["x", "y"], ["x", ""], TEXT * 50, TEXT * 1500, {"prompt": "x"}, [[[1]]]]
    prompts += [SURROGATE, NUL, EMOJI, SPECIAL, [2**31], [2**63], [2**64]]
    for number, prompt in enumerate(prompts):
        yield made(COMPLETIONS, f"prompt {number}: {str(prompt)[:30]!a}", prompt=prompt)
    values: dict[str, list[Json]] = {
        "n": [0, 1, 3],
        "best_of": [0, 2],
        "echo": [True, "x", None],
        "suffix": ["", "x", None, 3],
        "logprobs": [0, 1, -1, 1000, True],
        "prompt_logprobs": [0, 1, -1],
        "max_tokens": [0, -1, 10**6, None],
        "stop": ["", "e", ["e", "日"], [], 3],
        "seed": [1, -1, "x"],
        "logit_bias": [{"3": 1}, {"999999": 1}, {"x": 1}],
        "response_format": [{"type": "json_object"}, {"type": "yaml"}],
        "structured_outputs": [{"regex": "[ab]{2}"}, {"json": SCHEMA}, {"regex": "("}],
        "truncate_prompt_tokens": [1, 5, -1, 10**6],
        "add_special_tokens": [True, False],
        "prompt_embeds": ["", "AAAA", [], 3],
        "min_tokens": [2, 100],
        "allowed_token_ids": [[], [3]],
        "return_token_ids": [True],
        "priority": [1, "x"],
        "user": ["x", 3],
    }
    for key, each in values.items():
        for value in each:
            yield made(COMPLETIONS, f"{key}={value}", **{key: value})
    yield made(COMPLETIONS, "echo with logprobs", echo=True, logprobs=1)
    yield made(COMPLETIONS, "echo of nothing more", echo=True, max_tokens=0)
    yield made(COMPLETIONS, "echo, stream", echo=True, stream=True, logprobs=1)
    yield made(COMPLETIONS, "two prompts, stream", prompt=["x", "y"], stream=True)
    yield made(COMPLETIONS, "ids after their text", prompt=[28, 99, 1700] * 20, echo=True)


def _responses() -> Iterator[Case]:
    def one(content: Json, role: str = "user") -> list[Json]:
        return [{"role": role, "content": content}]

    inputs: dict[str, Json] = {
        "a conversation": response_items(),
        "parts": one([{"type": "input_text", "text": "x"}]),
        "a part of another type": one([{"type": "output_text", "text": "x"}]),
        "a broken part": one([{"type": "input_text"}]),
        "content null": one(None),
        "a message": [{"type": "message", **one("x")[0]}],
        "an unknown role": one("x", "critic"),
        "an unknown item": [{"type": "dance"}],
        "an item of text": ["x"],
        "a result of nobody": response_items()[2:],
        "a call without arguments": [{"type": "function_call", "call_id": "c", "name": "f"}],
        "reasoning": [{"type": "reasoning", "id": "rs_1", "summary": [], "content": []}],
        "a reference": [{"type": "item_reference", "id": "msg_none"}],
    }
    for name, value in {**inputs, **TEXTS}.items():
        yield made(RESPONSES, f"input {name}", input=value)
    values: dict[str, list[Json]] = {
        "instructions": ["Be brief.", "", None, 3, [], SURROGATE],
        "tools": [[FLAT_TOOL], [{"type": "function"}], [{"type": "web_search_preview"}], [3], None],
        "max_output_tokens": [0, -1, 10**6, None],
        "previous_response_id": ["resp_none", "", "x", 3, None],
        "store": [True, False, "x"],
        "background": [True],
        "text": [{"format": {"type": "text"}}, {"format": {"type": "json_object"}}, {}, 3],
        "reasoning": [{"effort": "low"}, {"effort": "x"}, None],
        "truncation": ["auto", "disabled", "x"],
        "include": [[], ["message.output_text.logprobs"], ["x"]],
        "top_logprobs": [0, 2, -1, 100],
        "parallel_tool_calls": [True, False, None],
        "prompt": [{"id": "x"}],
        "enable_response_messages": [True],
    }
    for key, each in values.items():
        for value in each:
            yield made(RESPONSES, f"{key}={value!a}", **{key: value})
    named = {"type": "function", "name": "get_weather"}
    for choice in ("auto", "none", "required", named, {**named, "name": "nobody"}, {}, 3):
        more = {"tools": [FLAT_TOOL], "tool_choice": choice, "max_output_tokens": 12}
        yield made(RESPONSES, f"choice {choice}", **more)
        yield made(RESPONSES, f"choice {choice}, stream", **more, stream=True)


def _messages() -> Iterator[Case]:
    text = {"type": "text", "text": TEXT}
    blocks: dict[str, Json] = {
        "text": [text],
        "nothing": [],
        "empty text": [{"type": "text", "text": ""}],
        "without type": [{"text": "x"}],
        "unknown": [{"type": "dance"}],
        "null": [None],
        "of text": ["x"],
        "an image": [{"type": "image", "source": {"type": "base64", "data": "AAAA"}}],
        "thinking": [{"type": "thinking", "thinking": "x", "signature": "s"}],
        "a result": [{"type": "tool_result", "tool_use_id": "t", "content": "x"}],
        "a result of blocks": [{"type": "tool_result", "tool_use_id": "t", "content": [text]}],
        "a result of nothing": [{"type": "tool_result", "tool_use_id": "t"}],
        "a result null": [{"type": "tool_result", "tool_use_id": None, "content": None}],
        "a use": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}],
        "a use without input": [{"type": "tool_use", "id": "t", "name": "f"}],
        "a use with a text": [{"type": "tool_use", "id": "t", "name": "f", "input": "x"}],
    }
    for path in (MESSAGES, COUNT_TOKENS):
        for name, content in {**blocks, **TEXTS}.items():
            yield made(path, f"content {name}", messages=[user(content)])
            answers = [user("x"), {"role": "assistant", "content": content}, user("y")]
            yield made(path, f"answer {name}", messages=answers)
        for system in ([text], [], "", None, [text, text], [{"type": "dance"}], SURROGATE):
            yield made(path, f"system {str(system)[:40]!a}", system=system)
        yield made(path, "a conversation with a call", **anthropic_tools())
        for tools in ([ANTHROPIC_TOOL], [], [{"name": "f"}], [{"input_schema": {}}], [3], "x"):
            yield made(path, f"tools {tools}", tools=tools)
        for choice in ({"type": "auto"}, {"type": "any"}, {"type": "none"}, {"type": "x"}, "auto"):
            yield made(path, f"choice {choice}", tools=[ANTHROPIC_TOOL], tool_choice=choice)
        for name in ("get_weather", "nobody", None):
            choice = {"type": "tool", "name": name}
            yield made(path, f"choice of {name}", tools=[ANTHROPIC_TOOL], tool_choice=choice)
    values: dict[str, list[Json]] = {
        "max_tokens": [0, 10**6],
        "stop_sequences": [["e"], [], [""], "e", None],
        "thinking": [{"type": "enabled", "budget_tokens": 5}, {"type": "disabled"}, 3],
        "output_config": [{"effort": "low"}, {}, 3],
        "top_k": [-5, 0, 3],
        "top_p": [0.5, 3],
    }
    for key, each in values.items():
        for value in each:
            yield made(MESSAGES, f"{key}={value}", **{key: value})
    more = {**anthropic_tools(), "tool_choice": {"type": "any"}, "max_tokens": 15}
    yield made(MESSAGES, "a call, stream", **more, stream=True)
    yield made(MESSAGES, "a session", **anthropic_tools(), metadata=claude_metadata())


def _tokens() -> Iterator[Case]:
    for name, text in {**TEXTS, "long": TEXT * 2000}.items():
        yield made(TOKENIZE, f"prompt {name}", prompt=text, return_token_strs=True)
        yield made(TOKENIZE, f"chat {name}", prompt=DROP, messages=[user("x"), user(text)])
    for value in (True, False, None, "x"):
        yield made(TOKENIZE, f"add_special_tokens {value}", add_special_tokens=value)
    for tokens in ([-1], [49152], [10**9], [2**64], [], [1.5], [True], list(range(3000))):
        yield made(DETOKENIZE, f"tokens {str(tokens)[:20]}", tokens=tokens)


def _fields() -> Iterator[Case]:
    """What the plugin reads and stock vLLM does not, or otherwise, on every endpoint."""
    odd = {**WEIRD, **TEXTS, "@": "a@b", "slash": "a/b\\c", "long": "k" * 10000, "id": "key-12345"}
    odd["ours"] = "stateful." + "0" * 16
    for path in STREAMED:
        for key in ("prompt_cache_key", "cache_salt", "session_id", "metadata"):
            for name, value in odd.items():
                yield made(path, f"{key} {name}", **{key: value})
        for user_id in (
            None,
            3,
            "",
            "x",
            "{",
            '{"session_id": 3}',
            "{" * 9000,
            SURROGATE,
            "_session_",
        ):
            yield made(path, f"user_id {str(user_id)[:20]!a}", metadata={"user_id": user_id})
        for retention in ("24h", "in_memory", "", 3, None, [], {}):
            yield made(path, f"retention {retention}", prompt_cache_retention=retention)
        for value in ("a-session-1", 3, None, [], {}):
            yield made(path, f"xargs session {value}", vllm_xargs={"session_id": value})
        for number, value in enumerate(_controls()):
            yield made(path, f"cache_control {number}", cache_control=value)


def _controls() -> list[Json]:
    kind = {"type": "ephemeral"}
    ttls = ["5m", "1h", "2h", "", None, 3, [], {}, float("inf")]
    return [kind, *({**kind, "ttl": ttl} for ttl in ttls), {}, {"type": []}, None, [], "x", 3]
