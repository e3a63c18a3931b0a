# SPDX-License-Identifier: Apache-2.0
"""Finds earlier places where a text has the same tokens as at its end, to see what followed there.

Every position is chained to the last one before it that ends in the same tokens, as in LZ77
compressors. There is one chain for each of ``GRAMS``. The chain of the longest gram finds long
repeats far back; that of the shortest shows what mostly follows a single token. Appending a token
and taking one back are O(1). A look-up walks the newest ``MAX_CANDIDATES`` places of each chain, so
its cost does not grow with the text. Memory: 28 to 56 bytes per token (the token, and for each
chain a link and a hash table of one to two entries per token).

Source: prompt lookup decoding (Saxena 2023; vLLM ``v1/spec_decode/ngram_proposer.py``), frequency
among the matches as in SuffixDecoding (arXiv:2411.04975), hash chains as in RFC 1951, section 4.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_stateful.speculate.compiled import compiled
from vllm_stateful.types import TokenArray

GRAMS = (6, 2, 1)
"""For each chain, the number of tokens before a place that must be equal; longest first."""

MAX_CANDIDATES = 32
"""Places of each chain that one look-up compares."""

MAX_MATCH = 64
"""Tokens up to which the length of a match is measured."""

MIN_CAPACITY = 1024

Ints = NDArray[np.int32]


class Found(NamedTuple):
    """Places before which a text has the same tokens as at its end.

    Places found in the chain of the longest gram come first; within a chain, the newest.

    Attributes:
        places: int32, shape ``[num_found]``: the position behind the equal tokens.
        lengths: int32, shape ``[num_found]``: the number of equal tokens before the place, up to
            ``MAX_MATCH``.
    """

    places: Ints
    lengths: Ints


class LookupIndex:
    """One text that grows and sometimes loses its end. Not thread-safe."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._tokens: Ints = np.empty(MIN_CAPACITY, np.int32)
        self._before: Ints = np.empty((len(GRAMS), MIN_CAPACITY), np.int32)
        self._newest: Ints = np.full((len(GRAMS), MIN_CAPACITY), -1, np.int32)
        self._places: Ints = np.empty(len(GRAMS) * MAX_CANDIDATES, np.int32)
        self._lengths: Ints = np.empty(len(GRAMS) * MAX_CANDIDATES, np.int32)

    def __len__(self) -> int:
        return self._num_tokens

    @property
    def tokens(self) -> TokenArray:
        """The tokens of the text, shape ``[len(self)]``; a view."""
        return self._tokens[: self._num_tokens]

    @property
    def num_bytes(self) -> int:
        """The memory of the index, in bytes."""
        return int(self._tokens.nbytes + self._before.nbytes + self._newest.nbytes)

    def extend(self, tokens: TokenArray) -> None:
        """Append tokens. O(len(tokens)), amortized."""
        start, end = self._num_tokens, self._num_tokens + len(tokens)
        if end > len(self._tokens):
            self._grow(end)
        self._tokens[start:end] = tokens
        self._num_tokens = end
        _chain(self._tokens, self._before, self._newest, start, end)

    def truncate(self, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` tokens. O(tokens taken back).

        Raises:
            ValueError: the text has fewer tokens.
        """
        if not 0 <= num_tokens <= self._num_tokens:
            raise ValueError(f"cannot keep {num_tokens} of {self._num_tokens} tokens")
        _unchain(self._tokens, self._before, self._newest, num_tokens, self._num_tokens)
        self._num_tokens = num_tokens

    def find(self) -> Found:
        """Find earlier places that end in the same tokens as the text."""
        return self.find_end_of(self._tokens, self._num_tokens, is_own=True)

    def find_end_of(self, tokens: Ints, num_tokens: int, *, is_own: bool = False) -> Found:
        """Find the places in this text that end in the same tokens as another text.

        Args:
            tokens: the other text, shape ``[>= num_tokens]``.
            num_tokens: the number of tokens of the other text.
            is_own: whether ``tokens`` is this text, whose own end is then left out.
        """
        count = _find(
            self._tokens,
            self._before,
            self._newest,
            tokens,
            num_tokens,
            is_own,
            self._places,
            self._lengths,
        )
        return Found(self._places[:count].copy(), self._lengths[:count].copy())

    def _grow(self, num_tokens: int) -> None:
        capacity = max(MIN_CAPACITY, 1 << (num_tokens - 1).bit_length())
        tokens = np.empty(capacity, np.int32)
        tokens[: self._num_tokens] = self.tokens
        self._tokens = tokens
        self._before = np.empty((len(GRAMS), capacity), np.int32)
        self._newest = np.full((len(GRAMS), capacity), -1, np.int32)
        _chain(self._tokens, self._before, self._newest, 0, self._num_tokens)


_GRAMS = np.array(GRAMS, np.int64)


@compiled
def _slot(tokens: Ints, end: int, gram: int, size: int) -> int:
    """The hash table entry of the ``gram`` tokens that end with the one at position ``end``."""
    mixed = np.uint64(0)
    for place in range(end - gram + 1, end + 1):
        mixed = (mixed ^ np.uint64(tokens[place])) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return int(np.int64(mixed & np.uint64(size - 1)))


@compiled
def _chain(tokens: Ints, before: Ints, newest: Ints, start: int, end: int) -> None:
    for chain in range(len(_GRAMS)):
        gram = _GRAMS[chain]
        for place in range(max(start, gram - 1), end):
            slot = _slot(tokens, place, gram, newest.shape[1])
            before[chain, place] = newest[chain, slot]
            newest[chain, slot] = place


@compiled
def _unchain(tokens: Ints, before: Ints, newest: Ints, start: int, end: int) -> None:
    for chain in range(len(_GRAMS)):
        gram = _GRAMS[chain]
        for place in range(end - 1, max(start, gram - 1) - 1, -1):
            slot = _slot(tokens, place, gram, newest.shape[1])
            newest[chain, slot] = before[chain, place]


@compiled
def _find(
    tokens: Ints,
    before: Ints,
    newest: Ints,
    other: Ints,
    num_other: int,
    is_own: bool,
    places: Ints,
    lengths: Ints,
) -> int:
    count = 0
    last = num_other - 1
    known = MAX_MATCH + 1  # matches this long were found in the chains before
    for chain in range(len(_GRAMS)):
        gram = _GRAMS[chain]
        if num_other < gram:
            continue
        place = newest[chain, _slot(other, last, gram, newest.shape[1])]
        if is_own:
            place = before[chain, place]
        for _ in range(MAX_CANDIDATES):
            if place < 0:
                break
            longest = min(MAX_MATCH, place + 1, num_other)
            length = 0
            while length < longest and tokens[place - length] == other[last - length]:
                length += 1
            if gram <= length < known:
                places[count] = place + 1
                lengths[count] = length
                count += 1
            place = before[chain, place]
        known = gram
    return count
