# SPDX-License-Identifier: Apache-2.0
"""The index against a search through all of the text."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from vllm_stateful.speculate import lookup_index
from vllm_stateful.speculate.lookup_index import GRAM, MAX_CANDIDATES, MAX_MATCH, LookupIndex
from vllm_stateful.types import TokenArray


def array(*tokens: int) -> TokenArray:
    return np.array(tokens, np.int32)


def by_search(text: list[int], other: list[int], *, is_own: bool) -> list[tuple[int, int]]:
    """Every place in the text that ends as the other text does, the newest first."""
    found = []
    for place in range(len(text) - is_own, 0, -1):
        length = 0
        while (
            length < min(place, len(other), MAX_MATCH)
            and text[place - 1 - length] == other[-1 - length]
        ):
            length += 1
        if length >= GRAM:
            found.append((place, length))
    return found[:MAX_CANDIDATES]


def pairs(found: lookup_index.Found) -> list[tuple[int, int]]:
    return list(zip(found.places.tolist(), found.lengths.tolist(), strict=True))


def test_the_newest_place_comes_first_with_the_length_of_its_match() -> None:
    index = LookupIndex()
    index.extend(array(9, 1, 2, 3, 4, 8, 1, 2, 3, 5, 9, 1, 2, 3))
    assert pairs(index.find()) == [(9, 3), (4, 4)]


def test_a_text_that_is_too_short_has_no_places() -> None:
    index = LookupIndex()
    index.extend(array(1, 1))
    assert pairs(index.find()) == []
    index.extend(array(1))
    assert pairs(index.find()) == []
    index.extend(array(1))
    assert pairs(index.find()) == [(3, 3)]


def test_more_cannot_be_taken_back_than_there_is() -> None:
    index = LookupIndex()
    index.extend(array(1, 2))
    with pytest.raises(ValueError, match="cannot keep 3 of 2 tokens"):
        index.truncate(3)


def test_memory_is_at_most_24_bytes_a_token_right_after_growing() -> None:
    index = LookupIndex()
    index.extend(np.arange(100_000, dtype=np.int32))
    assert index.num_bytes <= 24 * 100_000
    index.extend(np.arange(131_072 - 100_000, dtype=np.int32))
    assert index.num_bytes == 12 * 131_072


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.lists(st.integers(0, 2), max_size=12)),
        st.tuples(st.just("truncate"), st.integers(0, 40)),
        st.tuples(st.just("long"), st.integers(0, 1)),
    ),
    max_size=12,
)


@given(STEPS, st.lists(st.integers(0, 2), max_size=8))
def test_any_text_agrees_with_a_search(steps: list[tuple], foreign: list[int]) -> None:  # type: ignore[type-arg]
    index = LookupIndex()
    text: list[int] = []
    for what, argument in steps:
        if what == "truncate":
            text = text[: min(argument, len(text))]
            index.truncate(len(text))
        else:
            new = argument if what == "extend" else [n * 7 % 5 + argument for n in range(700)]
            text += new
            index.extend(array(*new))
        assert index.tokens.tolist() == text
        compare(pairs(index.find()), by_search(text, text, is_own=True))
    found = index.find_end_of(array(*foreign), len(foreign))
    compare(pairs(found), by_search(text, foreign, is_own=False))


def compare(found: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    """All of them, or the newest ones: other places in the same chain count up to the limit."""
    assert found == expected[: len(found)]
    assert len(found) >= min(len(expected), MAX_CANDIDATES // 2)
