# SPDX-License-Identifier: Apache-2.0
"""An id for a conversation that its client does not name, made from how the conversation begins.

A client or a router can stick to such an id. It is the same for every turn of a conversation, on
every replica. Conversations of one tenant have the same id only if they begin alike. Tools are left
out, because some agents change them from turn to turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

PREFIX = "c-"
"""How every such id begins."""

MAX_MESSAGES = 16
"""Messages that are searched for the user's first message."""

MAX_TEXTS, EDGE_CHARS = 128, 1024
"""The most texts that are read of a conversation, and how many characters of each end of a text.
A text's length counts as well."""

_MAX_DEPTH = 4
_DIGEST_BYTES = 12


def conversation_id(body: Mapping[str, Any], tenant: str) -> str | None:
    """An id made from the model, the system text and the user's first message.

    A body of completions has no messages, so its id is made from the whole prompt. It is another
    one when the prompt grows.

    Args:
        body: the JSON body of a chat, completions, responses or Anthropic request, as the client
            sent it.
        tenant: the tenant of the request, "" for none. It is the key of the hash, together with the
            body's ``cache_salt``.

    Returns:
        ``c-`` and 24 hex characters; None when the body has no conversation in it, or several.
    """
    turns = body.get("messages", body.get("input", body.get("prompt")))
    if not isinstance(turns, str | Sequence) or not turns or _is_several(turns):
        return None
    salt = body.get("cache_salt")
    digest = _Digest(f"{tenant}\0{salt if isinstance(salt, str) else ''}")
    for name in ("model", "system", "instructions"):
        digest.add(name)
        digest.add(_content_of(body.get(name)))
    for message in _messages_of(turns)[:MAX_MESSAGES]:
        role = message.get("role") if isinstance(message, Mapping) else None
        digest.add(role)
        digest.add(message if role is None else _content_of(message.get("content", message)))
        if role == "user":
            break
    return PREFIX + digest.hex()


def id_instead_of(name: str, tenant: str) -> str:
    """An id for a conversation that has a name which cannot be shown. Equal names give equal ids.

    Args:
        name: any text.
        tenant: the tenant of the request, "" for none.
    """
    digest = _Digest(f"{tenant}\0name")
    digest.add(name)
    return PREFIX + digest.hex()


class _Digest:
    """A digest of values of JSON, of which a bounded part is read."""

    def __init__(self, key: str) -> None:
        secret = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=64).digest()
        self._hash = blake2b(digest_size=_DIGEST_BYTES, key=secret)
        self._num_texts = 0

    def hex(self) -> str:
        return self._hash.hexdigest()

    def add(self, value: object, depth: int = 0) -> None:
        """Read a value; of a list of numbers, its length and its ends."""
        if self._num_texts >= MAX_TEXTS or depth > _MAX_DEPTH:
            return
        if isinstance(value, str):
            self._text(value)
        elif isinstance(value, Mapping):
            for name in sorted(value.keys() - {"cache_control"}):
                self._text(name)
                self.add(value[name], depth + 1)
        elif not isinstance(value, Sequence):
            self._text(str(value)[:EDGE_CHARS])
        elif value and isinstance(value[0], int):
            ends = [*value[:EDGE_CHARS], *value[-EDGE_CHARS:]]
            self._text(f"{len(value)}{[each for each in ends if isinstance(each, int)]}")
        else:
            for each in value[:MAX_TEXTS]:
                self.add(each, depth + 1)

    def _text(self, text: str) -> None:
        self._num_texts += 1
        ends = text if len(text) <= 2 * EDGE_CHARS else text[:EDGE_CHARS] + text[-EDGE_CHARS:]
        self._hash.update(f"{len(text)}\0{ends}\0".encode("utf-8", "surrogatepass"))


def _is_several(turns: str | Sequence[Any]) -> bool:
    """Whether there are several conversations: lists in a list, or several prompts."""
    if isinstance(turns, str):
        return False
    return isinstance(turns[0], list) or (isinstance(turns[0], str) and len(turns) > 1)


def _messages_of(turns: str | Sequence[Any]) -> Sequence[Any]:
    """The messages; a text or token ids are one message of the user."""
    if isinstance(turns, str) or not isinstance(turns[0], Mapping):
        text = turns[0] if not isinstance(turns, str) and isinstance(turns[0], str) else turns
        return [{"role": "user", "content": text}]
    return turns


def _content_of(content: Any) -> Any:
    """A message's content. Text that is split into parts is the same as text that is not."""
    if not isinstance(content, Sequence) or isinstance(content, str) or not content:
        return content
    if isinstance(content[0], int):  # token ids
        return content
    parts = content[:MAX_TEXTS]
    texts = [part.get("text", part) if isinstance(part, Mapping) else part for part in parts]
    return texts[0] if len(texts) == 1 else texts
