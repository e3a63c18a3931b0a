# SPDX-License-Identifier: Apache-2.0
"""One measured turn: the request, the streamed answer, and what the server says it reused."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from openai import OpenAI
from openai.types.chat import ChatCompletionChunk

from benchmarks.demo.agents import Agent, Step
from benchmarks.demo.tools.tool import call_tool

Message = dict[str, Any]
MAX_OUTPUT_TOKENS = 96


@dataclass
class ToolCall:
    """A call put together from its streamed pieces."""

    call_id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass
class Answer:
    """What the model said: compared between the servers by text and calls, not by ids."""

    text: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str = ""

    def says_the_same(self, other: "Answer") -> bool:
        return (self.text, self._calls()) == (other.text, other._calls())

    def means_the_same(self, other: "Answer") -> bool:
        """Whether the text is equal, and the calls have equal values, however they are written."""
        return (self.text, self._values()) == (other.text, other._values())

    def written(self) -> str:
        """Text and calls in one line."""
        calls = [f"{name}({arguments})" for name, arguments in self._calls()]
        return " ".join(" ".join([self.text, *calls]).split()) or "(nothing)"

    def _calls(self) -> list[tuple[str, str]]:
        return [(call.name, call.arguments) for call in self.tool_calls]

    def _values(self) -> list[tuple[str, Any]]:
        values: list[tuple[str, Any]] = []
        for name, arguments in self._calls():
            try:
                values.append((name, json.loads(arguments)))
            except json.JSONDecodeError:
                values.append((name, arguments))
        return values


@dataclass
class Measured:
    """One turn on one server.

    Attributes:
        first_chunk_ms: Until the role chunk, which is sent with the first token.
        num_new_tokens: Prompt tokens more than the turn before had.
        is_valid_call: Whether it called a tool, true to its schema.
        explanation: Why it computed what it computed, as the plugin says it; without it, nothing.
    """

    answer: Answer
    first_chunk_ms: float
    ttft_ms: float
    total_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    answer_id: str = ""
    num_new_tokens: int = 0
    num_accepted_drafts: int = 0
    is_valid_call: bool = False
    explanation: list[str] = field(default_factory=list)

    @property
    def num_computed_tokens(self) -> int:
        return self.num_prompt_tokens - self.num_cached_tokens


def measure(client: OpenAI, model: str, session_id: str, body: dict[str, Any]) -> Measured:
    """Send one turn and time its chunks; TTFT ends with the first content or tool call."""
    reader = _StreamReader()
    start = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"X-Session-ID": session_id},
        **body,
    )
    reader.read(stream)
    end = time.perf_counter()
    if reader.usage is None or reader.first_output_at is None:
        raise RuntimeError(f"the server ended the stream of {session_id} without an answer")
    details = reader.usage.prompt_tokens_details
    return Measured(
        answer=reader.answer,
        first_chunk_ms=1000 * (reader.first_chunk_at - start),
        ttft_ms=1000 * (reader.first_output_at - start),
        total_s=end - start,
        num_prompt_tokens=reader.usage.prompt_tokens,
        num_cached_tokens=(details.cached_tokens or 0) if details else 0,
        num_output_tokens=reader.usage.completion_tokens,
        answer_id=reader.answer_id,
    )


class _StreamReader:
    """Puts the chunks together and notes when the first ones came."""

    def __init__(self) -> None:
        self.answer = Answer()
        self.answer_id = ""
        self.usage: Any = None
        self.first_chunk_at = 0.0
        self.first_output_at: float | None = None

    def read(self, stream: Iterable[ChatCompletionChunk]) -> None:
        for chunk in stream:
            now = time.perf_counter()
            self.first_chunk_at = self.first_chunk_at or now
            self.answer_id = chunk.id
            self.usage = chunk.usage or self.usage
            for choice in chunk.choices:
                if self._add(choice) and self.first_output_at is None:
                    self.first_output_at = now

    def _add(self, choice: Any) -> bool:
        """Take one delta; true when it carries content or a piece of a tool call."""
        self.answer.finish_reason = choice.finish_reason or self.answer.finish_reason
        self.answer.text += choice.delta.content or ""
        calls = self.answer.tool_calls
        for piece in choice.delta.tool_calls or []:
            while len(calls) <= piece.index:
                calls.append(ToolCall())
            call = calls[piece.index]
            call.call_id = piece.id or call.call_id
            call.name += (piece.function and piece.function.name) or ""
            call.arguments += (piece.function and piece.function.arguments) or ""
        return bool(choice.delta.content or choice.delta.tool_calls)


class Session:
    """The transcript of one agent on one server."""

    def __init__(self, agent: Agent, run_id: str) -> None:
        self.agent = agent
        self.session_id = f"{agent.key}-{run_id}"
        self.messages: list[Message] = [{"role": "system", "content": agent.system_prompt}]
        self.num_prompt_tokens = 0

    def ask(self, step: Step) -> dict[str, Any]:
        """Begin a turn: add what the user says and return the body of the request."""
        if step.user:
            self.messages.append({"role": "user", "content": step.user})
        return {
            "messages": self.messages,
            "tools": [tool.to_openai() for tool in self.agent.tools],
            "tool_choice": step.tool_choice,
            "parallel_tool_calls": False,
            "temperature": 0,
            "max_tokens": MAX_OUTPUT_TOKENS,
        }

    def advance(self, measured: Measured) -> None:
        """End a turn: run the calls and keep answer and results; note what is known only now."""
        answer = measured.answer
        measured.num_new_tokens = measured.num_prompt_tokens - self.num_prompt_tokens
        self.num_prompt_tokens = measured.num_prompt_tokens
        message: Message = {"role": "assistant", "content": answer.text}
        if answer.tool_calls:
            message["tool_calls"] = [_to_openai(call) for call in answer.tool_calls]
        self.messages.append(message)
        results = [
            call_tool(self.agent.tools, call.name, call.arguments) for call in answer.tool_calls
        ]
        for call, result in zip(answer.tool_calls, results, strict=True):
            self.messages.append(
                {"role": "tool", "tool_call_id": call.call_id, "content": result.text}
            )
        measured.is_valid_call = bool(results) and all(result.is_valid for result in results)


def _to_openai(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.call_id, "type": "function", "function": function}
