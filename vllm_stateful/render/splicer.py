# SPDX-License-Identifier: Apache-2.0
"""Keep the ids that the model generated where the history says the same in other tokens.

Opt-in (``--stateful-history generated``), for it is another input than stock vLLM's: a text can
be spelled in several ways in tokens, and the model chose one that the tokenizer would not have.
What it gains: the KV of the answer is kept, and the next turn computes only what the client
added.
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
    """The history means the same: its generated ids stay."""
    DIFFERENT = "different"
    """The history says something else: tokenized anew."""
    UNFINISHED = "unfinished"
    """The answer did not end in an end-of-turn token: tokenized anew."""


class Splice(NamedTuple):
    """Generated ids and the text that they replace."""

    answer: tuple[int, ...]
    """Without the end-of-turn token."""
    byte: int
    """Where in the new text the end-of-turn token stands."""


class Splicer:
    """Finds out whether an answer may stay as it was generated.

    Args:
        decode: the text of token ids, special tokens included.
        count: told what became of each answer.
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
            rules: the tokenizer's safe tokens; an end-of-turn token has to be one of them.
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
