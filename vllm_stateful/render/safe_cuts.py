# SPDX-License-Identifier: Apache-2.0
"""Where a text may be cut so that tokenizing its parts equals tokenizing the whole.

A Hugging Face tokenizer first finds the added tokens in the raw text (leftmost, longest), and
only then normalizes, pre-tokenizes and encodes each piece between them on its own. So the text may
be cut just before an added token whose match depends on nothing around it: a special token that is
not normalized, strips no white space, is not bound to word boundaries, and cannot overlap another
added token. Source: ``AddedVocabulary.extract_and_normalize`` in tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_stateful.types import TokenArray

ByteArray = NDArray[np.uint8]
"""A text in UTF-8, shape ``[num_bytes]``."""


@dataclass(frozen=True)
class Cuts:
    """Safe cut points of one tokenized text, in ascending order."""

    byte_positions: NDArray[np.int64]
    """Shape ``[num_cuts]``: the byte of the UTF-8 text at which each safe token begins."""
    token_positions: NDArray[np.int64]
    """Shape ``[num_cuts]``: the index of that token."""

    def __len__(self) -> int:
        return len(self.byte_positions)

    @classmethod
    def none(cls) -> Cuts:
        return cls(np.empty(0, np.int64), np.empty(0, np.int64))

    def last_within(self, num_bytes: int) -> int:
        """How many cuts lie at or before a byte position."""
        return int(np.searchsorted(self.byte_positions, num_bytes, side="right"))

    def joined(self, count: int, tail: Cuts, num_bytes: int, num_tokens: int) -> Cuts:
        """The first ``count`` cuts, and those of a tail that begins at a byte and a token."""
        return Cuts(
            np.concatenate([self.byte_positions[:count], tail.byte_positions + num_bytes]),
            np.concatenate([self.token_positions[:count], tail.token_positions + num_tokens]),
        )


@dataclass(frozen=True)
class CutRules:
    """The safe tokens of one tokenizer: a text may be cut before each of them."""

    contents: Mapping[int, bytes]
    """The text of each safe token in UTF-8, by token id."""
    reach: int
    """Bytes behind a cut that must be known: the length of the longest added token."""
    ids: TokenArray
    """The safe token ids, ascending."""

    @cached_property
    def any_content(self) -> re.Pattern[bytes]:
        """Finds the text of any safe token. Texts of two such tokens never overlap."""
        return re.compile(b"|".join(map(re.escape, self.contents.values())) or rb"(?!)")

    @classmethod
    def of(cls, added_tokens: Mapping[int, Any], never: Iterable[int | None] = ()) -> CutRules:
        """Find the safe tokens of a tokenizer.

        Args:
            added_tokens: its added tokens by id, each with ``content``, ``special``,
                ``normalized``, ``lstrip``, ``rstrip`` and ``single_word`` (as tokenizers'
                ``AddedToken``).
            never: ids that are never safe, as they also stand for other text (the unknown token).
        """
        contents = [token.content for token in added_tokens.values() if token.content]
        excluded = set(never)
        overlap = _Overlaps(contents)
        safe = {
            int(token_id): token.content.encode()
            for token_id, token in added_tokens.items()
            if token_id not in excluded and _is_plain(token) and not overlap.of(token.content)
        }
        reach = max((len(content.encode()) for content in contents), default=0)
        return cls(safe, reach, np.array(sorted(safe), np.int32))

    def find(self, text: bytes, token_ids: TokenArray) -> Cuts | None:
        """The cuts of a tokenized text; None when text and token ids do not agree.

        Args:
            text: the text in UTF-8.
            token_ids: the tokens of the whole text, without those that a post-processor put around
                it.
        """
        positions = np.flatnonzero(np.isin(token_ids, self.ids))
        found = token_ids[positions]
        offsets = np.empty(len(positions), np.int64)
        for token_id in np.unique(found).tolist():
            places = _occurrences(text, self.contents[token_id])
            here = found == token_id
            if int(here.sum()) != len(places):
                return None
            offsets[here] = places
        if np.any(offsets[1:] <= offsets[:-1]):
            return None
        return Cuts(offsets, positions.astype(np.int64))


def _is_plain(token: Any) -> bool:
    content = token.content
    binds = token.normalized or token.lstrip or token.rstrip or token.single_word
    return bool(content) and content == content.strip() and bool(token.special) and not binds


class _Overlaps:
    """Whether a match of one added token could share characters with a match of another."""

    def __init__(self, contents: Sequence[str]) -> None:
        self._joined = "\0".join(contents)
        self._heads = {content[:size] for content in contents for size in range(1, len(content))}
        self._tails = {content[size:] for content in contents for size in range(1, len(content))}

    def of(self, content: str) -> bool:
        """Whether a token is part of another one, or its ends could overlap those of another."""
        if self._joined.count(content) > 1:
            return True
        inner = range(1, len(content))
        return any(content[size:] in self._heads for size in inner) or any(
            content[:size] in self._tails for size in inner
        )


def _occurrences(text: bytes, content: bytes) -> list[int]:
    places = []
    place = text.find(content)
    while place >= 0:
        places.append(place)
        place = text.find(content, place + len(content))
    return places
