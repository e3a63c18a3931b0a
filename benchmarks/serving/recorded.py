# SPDX-License-Identifier: Apache-2.0
"""Recorded agent conversations as plain chat messages with short answers, and recorded gaps.

The files are described in the README of the traces; they are not part of this repository. Nothing
is made up: a tool call becomes the text that a Hermes model writes for it, the tools stand in the
system message, and an answer that is too long to be decoded on a CPU is cut at a sentence.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

from benchmarks.models import TOOLS_TEMPLATE
from benchmarks.policy.traces import KVCT

Message = dict[str, str]
Count = Callable[[str], int]
"""How many tokens a text has."""

SOURCES = ("taubench",)
ONE_SHOT_SOURCE = "whowhen"
TOOL, USER = "tool", "user"
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s|\n")
_HEAD = "You may call one or more functions. The functions are described within <tools></tools>:"
_TAIL = """For each function call, return a JSON object within <tool_call></tool_call>:
<tool_call>
{"name": <function-name>, "arguments": <arguments-object>}
</tool_call>"""


class NoTracesError(RuntimeError):
    """A recorded file is not where it was looked for."""


@dataclass(frozen=True)
class Step:
    """One turn as it was recorded.

    Attributes:
        new_messages: What the client adds to the answer before: user messages or tool results.
        answer: What the model said, its tool calls written out.
        calls_tool: Whether the answer calls a tool.
    """

    new_messages: tuple[Message, ...]
    answer: str
    calls_tool: bool


@dataclass(frozen=True)
class Conversation:
    """A system message with the tools in it, and what followed."""

    name: str
    system: Message
    steps: tuple[Step, ...]


def conversations(
    folder: Path,
    sources: Sequence[str],
    count: Count,
    *,
    max_answer_tokens: int,
    has_schemas: bool = True,
) -> list[Conversation]:
    """All recorded conversations, each up to its first tool call that is longer than allowed.

    Args:
        folder: of the traces.
        sources: names of the text files, "taubench" for text_dev_taubench.jsonl.
        count: the model's tokens of a text.
        max_answer_tokens: longer text is cut at a sentence; a longer tool call ends it before.
        has_schemas: the tools as JSON schemas; else as signatures with their descriptions.
    """
    made = []
    for source in sources:
        for row in _rows(folder / f"text_dev_{source}.jsonl"):
            system = {"role": "system", "content": _system_text(row, has_schemas=has_schemas)}
            steps = tuple(_steps(row["messages"], count, max_answer_tokens))
            made.append(Conversation(row["id"], system, steps))
    return made


def texts(folder: Path, source: str, min_chars: int) -> list[str]:
    """The contents of messages that have at least so many characters."""
    contents = [
        message["content"] or ""
        for row in _rows(folder / f"text_dev_{source}.jsonl")
        for message in row["messages"]
    ]
    return [content for content in dict.fromkeys(contents) if len(content) >= min_chars]


def gaps(folder: Path) -> dict[str, list[float]]:
    """Seconds between an answer and the next turn, by what the turn waited for."""
    found: dict[str, list[float]] = {TOOL: [], USER: []}
    for row in _rows(folder / KVCT):
        if row["gap_since_prev_s"] is not None:
            found[row["trigger"]].append(float(row["gap_since_prev_s"]))
    return found


def rendered(messages: Sequence[Message]) -> str:
    """The prompt, as the server's chat template writes it."""
    text: str = _template().render(messages=messages, add_generation_prompt=True)
    return text


def shared_text(system: Message) -> str:
    """The part of the prompt that all sessions with this system message share."""
    text = rendered([system])
    return text[: text.rindex("<|im_start|>")]


@cache
def _template() -> Any:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TOOLS_TEMPLATE.read_text())


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise NoTracesError(f"no recorded file {path}; say with --traces where the traces are")
    with path.open() as file:
        yield from map(json.loads, file)


def _system_text(row: dict[str, Any], *, has_schemas: bool) -> str:
    first = row["messages"][0]
    parts = [first["content"]] if first["role"] == "system" else []
    tools = row["tools"] or []
    if tools:
        lines = map(json.dumps if has_schemas else _signature, tools)
        listed = "\n".join(["<tools>", *lines, "</tools>"])
        parts.append(f"# Tools\n\n{_HEAD}\n{listed}\n\n{_TAIL}")
    return "\n\n".join(parts)


def _signature(tool: dict[str, Any]) -> str:
    function = tool["function"]
    parameters = ", ".join(function["parameters"]["properties"])
    return f"{function['name']}({parameters}): {function['description']}"


def _steps(messages: Sequence[dict[str, Any]], count: Count, max_tokens: int) -> Iterator[Step]:
    """The turns in order; ends before an answer that can neither be kept nor cut."""
    new: list[Message] = []
    for message in messages:
        if message["role"] == "system":
            continue
        if message["role"] != "assistant":
            new.append({"role": message["role"], "content": message["content"] or ""})
            continue
        calls = "\n".join(_call_text(call) for call in message.get("tool_calls") or [])
        answer = _answer_text((message["content"] or "").strip(), calls, count, max_tokens)
        if not answer:
            return
        yield Step(tuple(new), answer, bool(calls))
        new = []


def _call_text(call: dict[str, Any]) -> str:
    """As a Hermes model writes it, with the spaces that ``json.dumps`` sets."""
    function = call["function"]
    call_text = json.dumps(
        {"name": function["name"], "arguments": json.loads(function["arguments"])},
        ensure_ascii=False,
    )
    return f"<tool_call>\n{call_text}\n</tool_call>"


def _answer_text(text: str, calls: str, count: Count, max_tokens: int) -> str:
    """Text and calls within the bound, the calls whole; empty where that cannot be."""
    if not calls:
        return cut_at_sentence(text, count, max_tokens)
    left = max_tokens - count(f"\n{calls}")
    if left < 0:
        return ""
    kept = cut_at_sentence(text, count, left) if text else ""
    return f"{kept}\n{calls}" if kept else calls


def cut_at_sentence(text: str, count: Count, max_tokens: int) -> str:
    """The most whole sentences or lines within the bound; empty where the first is too long."""
    if count(text) <= max_tokens:
        return text
    ends = [match.start() for match in _SENTENCE_END.finditer(text)]
    number = bisect_right(ends, max_tokens, key=lambda end: count(text[:end]))
    return text[: ends[number - 1]].rstrip() if number else ""
