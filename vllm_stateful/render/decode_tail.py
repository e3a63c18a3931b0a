# SPDX-License-Identifier: Apache-2.0
"""How much of a prompt an incremental detokenizer must see before the first new token.

``DecodeStream`` (tokenizers) decodes the whole prompt when the first token arrives, only to cut
it off again: what it emits is ``decode(prompt + new)`` without ``decode(prompt)``. Every decoder
of a language model works token by token and looks at most at its neighbours, so the tail of the
prompt gives the same text, provided that it decodes to something, and does not begin or end
inside a character that is spelled in byte tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

MIN_TAIL = 64
"""Tokens. Fewer would do; the cost is in the microseconds."""

REPLACEMENT = "\ufffd"
"""What an incomplete character decodes to."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

Decode = Callable[[Sequence[int]], str]


class Stream(Protocol):
    """An incremental detokenizer that was primed with a prompt."""

    def __call__(self, token_id: int) -> str | None:
        """The text that one more token adds."""


def tail_for_decoding(
    token_ids: Sequence[int], decode: Decode, token_of: Callable[[int], str | None]
) -> Sequence[int]:
    """The end of a prompt that primes a detokenizer as the whole prompt does.

    Args:
        token_ids: the prompt.
        decode: as the stream decodes (special tokens skipped or not).
        token_of: the vocabulary's entry of an id.

    Returns:
        The tail; all of ``token_ids`` when no shorter one is known to do.
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
    """Move a start to the left while it lies in a run of byte-fallback tokens."""
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
    """Try a detokenizer: does it say the same when primed with the tail of a prompt?

    Args:
        make_stream: primes a detokenizer with a prompt.
        decode: see ``tail_for_decoding``.
        token_of: see ``tail_for_decoding``.
        vocab_size: random ids are drawn below it.
        seed: of the random prompts.
    """
    random = Random(seed)
    for _ in range(32):
        prompt = [random.randrange(vocab_size) for _ in range(random.randint(65, 400))]
        if decode(prompt).endswith(REPLACEMENT):
            continue  # nobody's prompt ends inside a character
        whole, short = make_stream(prompt), make_stream(tail_for_decoding(prompt, decode, token_of))
        for _ in range(8):
            token_id = random.randrange(vocab_size)
            if _said(whole, token_id) != _said(short, token_id):
                return False
    return True


def _said(stream: Stream, token_id: int) -> str | type[Exception] | None:
    """What a stream says to one more token. An error is an answer too: vLLM handles it."""
    try:
        return stream(token_id)
    except Exception as error:
        return type(error)
