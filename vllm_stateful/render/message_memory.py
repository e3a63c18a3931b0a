# SPDX-License-Identifier: Apache-2.0
"""Conversations whose messages were parsed lately, found by their own last message.

A turn sends all messages again and adds a few. Parsing one does not depend on the others, so
what the unchanged ones were parsed to is taken from here, and what they were rendered to if the
chat template allows it (``append_only``). Bounded in messages, not only in
bytes: what they were parsed to are small dicts, and the garbage collector looks at each of them.
"""

from __future__ import annotations

import marshal
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

MIN_MESSAGES = 16
"""A shorter conversation is parsed as ever: there is nothing to gain."""

MAX_MESSAGES = 20_000
"""Messages of all conversations together."""

MAX_BYTES = 64 << 20
"""Bytes of all conversations together."""

MAX_NEW_MESSAGES = 32
"""How far back the last known message is looked for: a turn that adds more finds nothing."""

_CANONICAL = 2
"""The newest marshal format in which equal values have equal bytes (no references)."""

_Key = tuple[Hashable, int, bytes]


class Text(NamedTuple):
    """What a conversation was rendered to."""

    body: str
    generation_prompt: str
    """What follows the body when the model is to answer."""


@dataclass(eq=False, frozen=True, slots=True)
class Conversation:
    """Messages, what they were parsed to, and what they were rendered to."""

    images: list[bytes]
    parsed: list[Any]
    texts: dict[Hashable, Text]
    """By template and its arguments; filled when rendered."""

    @property
    def cost(self) -> int:
        """Bytes."""
        return sum(map(len, self.images)) + sum(len(text.body) for text in self.texts.values())


class Known(NamedTuple):
    """The leading messages that were seen before."""

    num_messages: int
    conversation: Conversation

    @property
    def parsed(self) -> list[Any]:
        return self.conversation.parsed


NOTHING = Known(0, Conversation([], [], {}))


def exact_image(value: Any) -> bytes | None:
    """Bytes that only values share that are equal in type and in the order of their keys; None when
    it is not plain JSON."""
    try:
        return marshal.dumps(value, _CANONICAL)
    except ValueError:
        return None


def images_of(messages: Sequence[Any]) -> list[bytes] | None:
    """An exact image of each message, in its types too; None when one is not plain JSON.

    To be taken before the messages are parsed, which changes them.
    """
    if len(messages) < MIN_MESSAGES:
        return None
    try:
        return [marshal.dumps(message, _CANONICAL) for message in messages]
    except ValueError:
        return None


class MessageMemory:
    """Least recently used conversations first out. Thread-safe."""

    def __init__(self, max_messages: int = MAX_MESSAGES, max_bytes: int = MAX_BYTES) -> None:
        self.max_messages = max_messages
        self.max_bytes = max_bytes
        self.num_messages = 0
        self.num_bytes = 0
        self._lock = threading.Lock()
        self._conversations: OrderedDict[_Key, Conversation] = OrderedDict()

    def find(self, scope: Hashable, images: list[bytes]) -> Known:
        """The longest remembered conversation that a turn continues.

        Args:
            scope: conversations of other scopes are not looked at.
            images: ``images_of`` all messages of the turn.
        """
        first = max(1, len(images) - MAX_NEW_MESSAGES)
        with self._lock:
            for count in range(len(images), first - 1, -1):
                found = self._conversations.get((scope, count, images[count - 1]))
                if found is not None and found.images == images[:count]:
                    return Known(count, found)
        return NOTHING

    def keep(
        self, scope: Hashable, images: list[bytes], parsed: list[Any], known: Known = NOTHING
    ) -> Conversation | None:
        """Remember a conversation in place of the one that it continues.

        Returns:
            What is remembered; None when it is not.

        Args:
            scope: see ``find``.
            images: of its messages.
            parsed: one parsed message for each; not to be changed by anyone.
            known: what ``find`` had returned.
        """
        with self._lock:
            if known.num_messages:
                self._drop((scope, known.num_messages, images[known.num_messages - 1]))
            if len(images) != len(parsed):
                return None
            key = (scope, len(images), images[-1])
            self._drop(key)
            made = self._conversations[key] = Conversation(images, parsed, {})
            self.num_messages += len(images)
            self.num_bytes += made.cost
            self._shrink()
            return made

    def add_text(
        self, scope: Hashable, conversation: Conversation, template: Hashable, text: Text
    ) -> None:
        """Remember what a conversation was rendered to; nothing when it was dropped meanwhile."""
        images = conversation.images
        with self._lock:
            if self._conversations.get((scope, len(images), images[-1])) is not conversation:
                return
            before = conversation.cost
            conversation.texts[template] = text
            self.num_bytes += conversation.cost - before
            self._shrink()

    def _shrink(self) -> None:
        while self.num_messages > self.max_messages or self.num_bytes > self.max_bytes:
            self._drop(next(iter(self._conversations)))

    def _drop(self, key: _Key) -> None:
        dropped = self._conversations.pop(key, None)
        if dropped is not None:
            self.num_messages -= len(dropped.images)
            self.num_bytes -= dropped.cost
