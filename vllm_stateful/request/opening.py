# SPDX-License-Identifier: Apache-2.0
"""Names a conversation by its beginning, when the client does not name it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

MAX_MESSAGES = 16
"""Messages that are searched for the user's first message."""


def opening_of(messages: object) -> str | None:
    """A digest of the beginning of a conversation: its messages up to the user's first.

    It is the same for every turn of a conversation. Different conversations have the same digest
    only if they begin alike, for example as samples of one task.

    Args:
        messages: the messages as the client sent them: mappings with ``role`` and ``content``,
            which is a string or a list of parts.

    Returns:
        The digest; None when there is no message of the user, or when a message is more than text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        return None
    seen = blake2b(digest_size=16)
    for message in messages[:MAX_MESSAGES]:
        if not isinstance(message, Mapping):
            return None
        text = _text(message.get("content"))
        if text is None:
            return None
        role = str(message.get("role"))
        seen.update(f"{role}\0{len(text)}\0{text}\0".encode("utf-8", "surrogatepass"))
        if role == "user":
            return seen.hexdigest()
    return None


def _text(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        return None
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "\0".join(texts)
