# SPDX-License-Identifier: Apache-2.0
"""Conversations that go through a router, and what their turns found.

Every turn is streamed and says its session in ``X-Session-ID``. A turn *found its session* when
all of the prompt of the turn before was cached: its replica had it. Conversations share nothing, so
no part of a prompt is cached for another reason.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.field.router_programs import API_KEY

ANSWER_TOKENS = 16
CLIENTS = 2
"""Turns in flight."""
TRIES, PAUSE_S = 30, 1.0
"""How often a client sends a turn that failed, and the pause before it does."""
SYSTEM_WORDS, QUESTION_WORDS = 60, 12
_WORDS = ("river", "stone", "paper", "window", "garden", "engine", "letter", "market", "silver")


class BrokenAnswerError(Exception):
    """An answer that ended without its end."""


@dataclass
class Turn:
    """What became of one turn.

    Attributes:
        cached: the tokens of its prompt that were cached.
        before: the tokens in the prompt of the turn before; 0 for the first turn.
        errors: why it failed before it succeeded, one text for each time.
        echoed: the ``X-Session-ID`` of the answer as the client got it.
    """

    prompt: int
    cached: int
    before: int
    errors: list[str]
    echoed: str | None

    @property
    def has_found(self) -> bool:
        return self.before > 0 and self.cached >= self.before - 1


@dataclass
class Conversation:
    """One session of one client.

    Attributes:
        session_id: said with every turn; None for a client that says none.
        name: the first line of the conversation says it; the session id where it is empty.
    """

    url: str
    model: str
    session_id: str | None
    seed: int
    name: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        text = f"Session {self.name or self.session_id}. {self._text(SYSTEM_WORDS)}"
        self.messages.append({"role": "system", "content": text})

    def take_turn(self, **more: Any) -> Turn:
        """Ask, and ask again where it fails; ``more`` goes to `ask`, but only the first time."""
        self.messages.append({"role": "user", "content": self._text(QUESTION_WORDS)})
        errors: list[str] = []
        for number in range(TRIES):
            try:
                usage, text, echoed = self.ask(**(more if number == 0 else {}))
            except (httpx.HTTPError, BrokenAnswerError) as error:
                errors.append(_named(error))
                time.sleep(PAUSE_S)
                continue
            break
        else:
            raise RuntimeError(f"a turn failed {TRIES} times: {errors}")
        self.messages.append({"role": "assistant", "content": text})
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        before = self.turns[-1].prompt if self.turns else 0
        made = Turn(usage["prompt_tokens"], cached, before, errors, echoed)
        self.turns.append(made)
        return made

    @property
    def answers(self) -> list[str]:
        """The texts of all answers so far."""
        return [each["content"] for each in self.messages if each["role"] == "assistant"]

    def ask_again(self) -> str:
        """Send the last turn once more as it was. Returns the answer, which is not kept."""
        answer = self.messages.pop()
        try:
            return self.ask()[1]
        finally:
            self.messages.append(answer)

    def ask(
        self, *, max_tokens: int = ANSWER_TOKENS, on_text: Callable[[int], None] | None = None
    ) -> tuple[dict[str, Any], str, str | None]:
        """Send the messages once.

        Args:
            max_tokens: the length of the answer.
            on_text: called with the number of pieces of text that have come.

        Returns:
            Usage, text, and the session id in the answer's headers.

        Raises:
            httpx.HTTPError: no answer, or an error.
            BrokenAnswerError: the stream ended before its end.
        """
        body = {
            "model": self.model,
            "messages": self.messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"Authorization": f"Bearer {API_KEY}"}
        if self.session_id is not None:
            headers["X-Session-ID"] = self.session_id
        usage: dict[str, Any] | None = None
        texts: list[str] = []
        path = f"{self.url}/v1/chat/completions"
        with httpx.stream("POST", path, json=body, headers=headers, timeout=300) as answer:
            if answer.is_error:
                answer.read()
            answer.raise_for_status()
            for event in _events(answer.iter_lines()):
                if "error" in event:
                    raise BrokenAnswerError("an error in the stream")
                usage = event.get("usage") or usage
                for choice in event.get("choices") or ():
                    text = choice["delta"].get("content")
                    if text:
                        texts.append(text)
                        if on_text is not None:
                            on_text(len(texts))
            echoed = answer.headers.get("x-session-id")
        if usage is None:
            raise BrokenAnswerError("the stream ended early")
        return usage, "".join(texts), echoed

    def _text(self, num_words: int) -> str:
        return " ".join(self._random.choice(_WORDS) for _ in range(num_words)) + "."


def play_round(conversations: list[Conversation], order: random.Random) -> None:
    """One turn of each conversation, in a random order."""
    shuffled = order.sample(conversations, len(conversations))
    with ThreadPoolExecutor(CLIENTS) as pool:
        for done in [pool.submit(each.take_turn) for each in shuffled]:
            done.result()


def _events(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield json.loads(data)


def _named(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code}"
    return str(error) if isinstance(error, BrokenAnswerError) else type(error).__name__
