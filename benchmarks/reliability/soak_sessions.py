# SPDX-License-Identifier: Apache-2.0
"""What the clients of the soak say: conversations with tools, forks, edits; all from one seed.

No request has a `seed` of its own. In vLLM 0.32 on a CPU, stock too, the engine dies of a seeded
request whose prompt is computed in chunks ("CPU Generator does not use offset").
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from typing import Any

from benchmarks.reliability.soak_client import Answer, Request
from benchmarks.reliability.soak_servers import ADAPTERS, MAX_MODEL_LEN, SWAP, Options
from benchmarks.serving.servers import MODEL_NAME

TENANTS = ("", "key-of-one", "key-of-two", "key-of-three")
_TEXT = (
    "the agent reads a file and writes café tests then it runs make build 17 λ times while "
    "error line 42 returns None from parse_args() in src/main.py — and again, naïve or not; "
    "a plan has steps: look, edit, check, commit. 日本 result ok fails {json} <tag> 3.14"
)
WORDS = _TEXT.split()
MOST_ANSWER = 32
MOST_CHARS = 3 * (MAX_MODEL_LEN - 600)
"""Of a conversation; with these words a token has some three characters and more."""

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks something up.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def words(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


_SYSTEMS = [words(random.Random(number), 40, 160) for number in range(5)]
"""Shared by many sessions: prefixes to join and to fork."""


@dataclass
class Session:
    """One conversation.

    Attributes:
        id: as the client names it; None: it does not.
        how: where the id stands in a request.
        api: which endpoint it talks to.
    """

    id: str | None
    how: str
    key: str
    salt: str | None
    model: str
    api: str
    system: str
    has_tools: bool = False
    parent: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)

    def num_chars(self) -> int:
        return len(self.system) + sum(
            len(str(message.get("content") or "")) + 150 for message in self.messages
        )

    def fork(self, new_id: str | None) -> Session:
        """A sub-agent with the same history."""
        made = copy.deepcopy(self)
        made.id, made.parent = new_id, self.id
        return made

    def hear(self, answer: Answer, choice: int) -> None:
        """The answer becomes part of the history, also a broken one."""
        text = answer.texts.get(choice) or "nothing"
        self.messages.append({"role": "assistant", "content": text})

    def headers(self) -> dict[str, str]:
        made = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        if self.id and self.how in ("x-session-id", "x-claude-code-session-id"):
            made[self.how] = self.id
            if self.parent and self.how == "x-session-id":
                made["x-parent-session-id"] = self.parent
        return made


def new_session(draw: random.Random, number: str, options: Options, *, is_named: bool) -> Session:
    """A conversation that has not begun."""
    how = draw.choice(("body", "x-session-id", "x-claude-code-session-id", "prompt_cache_key"))
    api = draw.choices(("chat", "messages", "responses", "completions"), (6, 2, 2, 2))[0]
    if api == "messages":
        how = "x-claude-code-session-id"
    elif api == "responses" and how == "body":
        how = "prompt_cache_key"
    model = {
        "none": MODEL_NAME,
        "fixed": draw.choice(ADAPTERS),
        "swap": SWAP,
    }[options.lora]
    salt = None if draw.random() < 0.6 else f"salt-{draw.randint(1, 3)}"
    return Session(
        id=f"soak-{number}-{draw.getrandbits(48):012x}" if is_named else None,
        how=how,
        key=draw.choice(TENANTS),
        salt=salt if api != "messages" else None,
        model=model,
        api=api,
        system=draw.choice(_SYSTEMS),
        has_tools=api == "chat" and draw.random() < 0.4,
    )


def say_something(draw: random.Random, session: Session) -> None:
    """The user, or a tool that was called, says the next thing; the history may be edited."""
    messages = session.messages
    if messages and draw.random() < 0.15:
        _edit(draw, messages)
    if session.has_tools and messages and draw.random() < 0.5:
        call = {"name": "look_up", "arguments": '{"city": "Rome"}'}
        call_id = f"call-{draw.getrandbits(24):06x}"
        called = {"id": call_id, "type": "function", "function": call}
        if messages[-1]["role"] == "assistant":
            messages[-1] = {**messages[-1], "tool_calls": [called]}
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [called]})
        result = words(draw, 5, 60)
        messages.append({"role": "tool", "tool_call_id": call_id, "content": result})
    else:
        messages.append({"role": "user", "content": words(draw, 3, 60)})


def _edit(draw: random.Random, messages: list[dict[str, Any]]) -> None:
    """One message is told otherwise, or all behind one is taken back."""
    place = draw.randrange(len(messages))
    if draw.random() < 0.5:
        messages[place] = {**messages[place], "content": words(draw, 3, 30)}
    else:
        while place and messages[place]["role"] != "user":  # no tool result without its call
            place -= 1
        del messages[place:]


def make_request(draw: random.Random, session: Session) -> Request:
    """The next turn, in one of the manners of clients."""
    body: dict[str, Any] = {"model": session.model, "temperature": 0}
    limit = draw.randint(4, MOST_ANSWER)
    if session.api == "chat":
        _fill_chat(draw, session, body, limit)
    elif session.api == "messages":
        body |= {"system": session.system, "messages": session.messages, "max_tokens": limit}
    elif session.api == "responses":
        body |= {"instructions": session.system, "input": session.messages, "store": False}
        body["max_output_tokens"] = max(limit, 16)
    else:
        told = "\n".join(str(message["content"]) for message in session.messages)
        body |= {"prompt": f"{session.system}\n{told}", "max_tokens": limit}
    if session.salt:
        body["cache_salt"] = session.salt
    if session.id and session.how == "body":
        body["session_id"] = session.id
    elif session.id and session.how == "prompt_cache_key":
        body["prompt_cache_key"] = session.id
    if draw.random() < 0.15:
        body["temperature"] = 0.8
    if session.api in ("chat", "completions"):
        _vary(draw, body)
    request = Request(session.api, copy.deepcopy(body), session.headers())
    _choose_manner(draw, request)
    return request


def _fill_chat(draw: random.Random, session: Session, body: dict[str, Any], limit: int) -> None:
    system = {"role": "system", "content": session.system}
    body |= {"messages": [system, *session.messages], "max_tokens": limit}
    if session.has_tools:
        body["tools"] = [TOOL]
        body["tool_choice"] = "none"
        if draw.random() < 0.2:
            body |= {"tool_choice": "required", "max_tokens": 48, "return_token_ids": True}


def _vary(draw: random.Random, body: dict[str, Any]) -> None:
    """Options that change how an answer is made or told."""
    if draw.random() < 0.5:
        body["return_token_ids"] = True
    if body["temperature"] and draw.random() < 0.3:
        body["n"] = 2  # vLLM allows one greedy answer only
    chance = draw.random()
    if chance < 0.05:
        body["repetition_penalty"] = 1.2
    elif chance < 0.1:
        body["stop"] = ["a", "e"]
    elif chance < 0.15:
        body["vllm_xargs"] = {"stateful_drafts": draw.randint(0, 1)}
    elif chance < 0.2:
        body |= {"presence_penalty": 0.5, "ignore_eos": True}


def _choose_manner(draw: random.Random, request: Request) -> None:
    """Whole, streamed, streamed to a slow reader, or to one that goes in the middle."""
    chance = draw.random()
    if chance < 0.4:
        return
    request.body["stream"] = True
    if request.api in ("chat", "completions"):
        request.body["stream_options"] = {"include_usage": True}
    if chance > 0.85:
        request.breaks_after = draw.randint(1, 12)
    elif chance > 0.75:
        request.pause_s = draw.uniform(0.02, 0.3)
