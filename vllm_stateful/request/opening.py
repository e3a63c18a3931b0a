# SPDX-License-Identifier: Apache-2.0
"""A name for a conversation that its client does not name: how it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

MAX_MESSAGES = 16
"""Messages among which the first of the user is looked for."""


def opening_of(messages: object) -> str | None:
    """The same for every turn of a conversation, and hardly ever for two conversations.

    Two that begin with the same question, as samples of one task do, have the same.

    Args:
        messages: as the client sent them: mappings with ``role`` and ``content``, the latter a
            string or a list of parts.

    Returns:
        A digest of all messages up to the first of the user; None where there is none, or it is
        more than text.
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
