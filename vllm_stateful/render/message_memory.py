# SPDX-License-Identifier: Apache-2.0
"""Remembers the messages of recent conversations, parsed and rendered.

A turn sends all messages of its conversation again and adds a few. Parsing a message does not
depend on the others, so the parsed form of unchanged messages is taken from here. So is their text,
if the chat template allows it (``append_only``). A conversation is found by its last message. The
memory is bounded in messages as well as in bytes, because parsed messages are small dicts and the
garbage collector looks at each of them.
"""

from __future__ import annotations

import marshal
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

MIN_MESSAGES = 16
"""Messages below which a conversation is not remembered: there is nothing to gain."""

MAX_MESSAGES = 20_000
"""Messages of all conversations together."""

MAX_BYTES = 64 << 20
"""Bytes of all conversations together."""

MAX_NEW_MESSAGES = 32
"""How many messages back the last known one is looked for. A turn that adds more finds nothing."""

_CANONICAL = 2
"""The newest marshal format in which equal values have equal bytes: it has no references."""

_Key = tuple[Hashable, int, bytes]


class Text(NamedTuple):
    """The rendered text of a conversation."""

    body: str
    generation_prompt: str
    """The text that follows the body when the model must answer."""


@dataclass(eq=False, frozen=True, slots=True)
class Conversation:
    """The messages of a conversation, their parsed form, and their text."""

    images: list[bytes]
    """The exact image of each message (``images_of``)."""
    parsed: list[Any]
    texts: dict[Hashable, Text]
    """The text by template and its arguments. Filled when the conversation is rendered."""

    @property
    def cost(self) -> int:
        """The memory that the conversation counts as, in bytes."""
        return sum(map(len, self.images)) + sum(len(text.body) for text in self.texts.values())


class Known(NamedTuple):
    """The leading messages of a turn that were seen before."""

    num_messages: int
    conversation: Conversation

    @property
    def parsed(self) -> list[Any]:
        return self.conversation.parsed


NOTHING = Known(0, Conversation([], [], {}))


def exact_image(value: Any) -> bytes | None:
    """A value as bytes; None when it is not plain JSON.

    Two values have equal bytes only if they are equal, with the same types and order of keys.
    """
    try:
        return marshal.dumps(value, _CANONICAL)
    except ValueError:
        return None


def images_of(messages: Sequence[Any]) -> list[bytes] | None:
    """The ``exact_image`` of each message; None for few messages or if one is not plain JSON.

    Call this before the messages are parsed: parsing changes them.
    """
    if len(messages) < MIN_MESSAGES:
        return None
    try:
        return [marshal.dumps(message, _CANONICAL) for message in messages]
    except ValueError:
        return None


class MessageMemory:
    """Recent conversations. The least recently used one goes first. Thread-safe."""

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
            scope: only conversations of this scope are looked at.
            images: ``images_of`` all messages of the turn.

        Returns:
            The known leading messages; ``NOTHING`` when none are known.
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

        Args:
            scope: see ``find``.
            images: the exact images of its messages.
            parsed: one parsed message for each image. They must not be changed afterwards.
            known: what ``find`` returned.

        Returns:
            The remembered conversation; None if the numbers of images and messages differ.
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
        """Remember the text of a conversation; a no-op when it was dropped meanwhile."""
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
