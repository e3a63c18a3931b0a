# SPDX-License-Identifier: Apache-2.0
"""Keep the ids that the model generated when the history means the same in other tokens.

This is opt-in (``--stateful-history generated``) because the model's input then differs from stock
vLLM's: a text can be spelled in several ways in tokens, and the model may have chosen another way
than the tokenizer does. In return the KV of the answer is kept, and the next turn computes only
what the client added.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple

from vllm_stateful.render.safe_cuts import CutRules
from vllm_stateful.render.same_meaning import means_the_same
from vllm_stateful.render.text_memory import Entry


class Spliced(StrEnum):
    """What became of a generated answer; a label of ``vllm_stateful_answers_total``."""

    KEPT = "kept"
    """The history means the same. The generated ids are kept."""
    DIFFERENT = "different"
    """The history says something else. It is tokenized anew."""
    UNFINISHED = "unfinished"
    """As ``different``, of an answer that did not end with an end-of-turn token."""


class Splice(NamedTuple):
    """Generated ids and the text that they replace."""

    answer: tuple[int, ...]
    """The generated ids, without an end-of-turn token."""
    byte: int
    """The byte of the new text at which the end-of-turn token begins."""


class Splicer:
    """Decides whether an answer in a history keeps the ids that were generated.

    Args:
        decode: returns the text of token ids, special tokens included.
        count: called with what became of each answer.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], count: Callable[[Spliced], None]
    ) -> None:
        self._decode = decode
        self._count = count

    def splice(self, entry: Entry, data: bytes, rules: CutRules) -> Splice | None:
        """Compare the answers to a prompt with what follows it in a new text.

        Args:
            entry: the prompt; ``data`` begins with its text.
            data: the new text, in UTF-8.
            rules: the tokenizer's safe tokens. An end-of-turn token must be one of them.

        Returns:
            The answer to keep; None when none of them means the same.
        """
        if not entry.answers or len(data) == entry.num_bytes:
            return None
        result = Spliced.UNFINISHED
        for answer in reversed(entry.answers):
            end_of_turn = rules.contents.get(answer[-1]) if answer else None
            if end_of_turn is None:
                kept, byte = answer, _end_of_unended(answer, entry.num_bytes, data, rules)
            else:
                result = Spliced.DIFFERENT
                kept, byte = answer[:-1], data.find(end_of_turn, entry.num_bytes)
            if not kept or byte < 0:
                continue
            rendered = data[entry.num_bytes : byte].decode()
            if means_the_same(rendered, self._decode(kept)):
                self._count(Spliced.KEPT)
                return Splice(kept, byte)
        self._count(result)
        return None


def _end_of_unended(answer: Sequence[int], start: int, data: bytes, rules: CutRules) -> int:
    """Where a text may be cut behind an answer that has no end-of-turn token.

    Such an answer was ended by a tool call that was complete, or by ``max_tokens``. The template
    still ends its turn. The cut is before the first safe token behind those of the answer itself.

    Returns:
        The byte, or -1 when there is no such token.
    """
    num_within = sum(token_id in rules.contents for token_id in answer)
    found = itertools.islice(rules.any_content.finditer(data, start), num_within, None)
    return next((place.start() for place in found), -1)
