# SPDX-License-Identifier: Apache-2.0
"""How much of a prompt an incremental detokenizer must see before the first new token.

``DecodeStream`` (tokenizers) decodes the whole prompt when the first token arrives, only to cut its
text off again: it emits ``decode(prompt + new)`` without ``decode(prompt)``. Every decoder of a
language model works token by token and looks at neighbouring tokens at most. So the tail of the
prompt gives the same text, if the tail decodes to something and does not begin or end inside a
character that is spelled in byte tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

MIN_TAIL = 64
"""Tokens of the shortest tail. Fewer would do, but this many cost only microseconds."""

REPLACEMENT = "\ufffd"
"""The text to which an incomplete character decodes."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

Decode = Callable[[Sequence[int]], str]


class Stream(Protocol):
    """An incremental detokenizer that has been given a prompt."""

    def __call__(self, token_id: int) -> str | None:
        """The text that one more token adds."""


def tail_for_decoding(
    token_ids: Sequence[int], decode: Decode, token_of: Callable[[int], str | None]
) -> Sequence[int]:
    """The end of a prompt that primes a detokenizer as the whole prompt does.

    Args:
        token_ids: the prompt.
        decode: decodes as the stream does (with or without special tokens).
        token_of: the vocabulary's entry for an id.

    Returns:
        The tail; all of ``token_ids`` when no shorter tail is known to be enough.
    """
    length = MIN_TAIL
    while length < len(token_ids):
        start = _before_byte_tokens(token_ids, len(token_ids) - length, token_of)
        tail = token_ids[start:]
        text = decode(tail)
        if text.strip() and not text.endswith(REPLACEMENT):
            return tail
        length *= 4
    return token_ids


def _before_byte_tokens(
    token_ids: Sequence[int], start: int, token_of: Callable[[int], str | None]
) -> int:
    """Move ``start`` to the left, to the beginning of a run of byte-fallback tokens."""
    while start > 0 and _BYTE_TOKEN.fullmatch(token_of(token_ids[start]) or ""):
        start -= 1
    return start


def is_decodable_from_tail(
    make_stream: Callable[[Sequence[int]], Stream],
    decode: Decode,
    token_of: Callable[[int], str | None],
    vocab_size: int,
    seed: int = 0,
) -> bool:
    """Try on random prompts whether a detokenizer says the same when primed with the tail only.

    Args:
        make_stream: makes a detokenizer and primes it with a prompt.
        decode: see ``tail_for_decoding``.
        token_of: see ``tail_for_decoding``.
        vocab_size: random ids are smaller than this.
        seed: the seed of the random prompts.
    """
    random = Random(seed)
    for _ in range(32):
        prompt = [random.randrange(vocab_size) for _ in range(random.randint(65, 400))]
        if decode(prompt).endswith(REPLACEMENT):
            continue  # real prompts do not end inside a character
        whole, short = make_stream(prompt), make_stream(tail_for_decoding(prompt, decode, token_of))
        for _ in range(8):
            token_id = random.randrange(vocab_size)
            if _said(whole, token_id) != _said(short, token_id):
                return False
    return True


def _said(stream: Stream, token_id: int) -> str | type[Exception] | None:
    """What a stream returns for one more token. An error counts as well: vLLM handles it."""
    try:
        return stream(token_id)
    except Exception as error:
        return type(error)
