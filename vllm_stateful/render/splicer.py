# SPDX-License-Identifier: Apache-2.0
"""Keep the ids that the model generated when the history means the same in other tokens.

This is opt-in (``--stateful-history generated``) because the model's input then differs from stock
vLLM's: a text can be spelled in several ways in tokens, and the model may have chosen another way
than the tokenizer does. In return the KV of the answer is kept, and the next turn computes only
what the client added.
"""

from __future__ import annotations

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
    """The answer did not end with an end-of-turn token. The history is tokenized anew."""


class Splice(NamedTuple):
    """Generated ids and the text that they replace."""

    answer: tuple[int, ...]
    """The generated ids, without the end-of-turn token."""
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
                continue
            result = Spliced.DIFFERENT
            byte = data.find(end_of_turn, entry.num_bytes)
            if byte < 0:
                continue
            rendered = data[entry.num_bytes : byte].decode()
            if means_the_same(rendered, self._decode(answer[:-1])):
                self._count(Spliced.KEPT)
                return Splice(answer[:-1], byte)
        self._count(result)
        return None
