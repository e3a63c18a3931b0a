# SPDX-License-Identifier: Apache-2.0
"""The index against a search through all of the text."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from vllm_stateful.speculate import lookup_index
from vllm_stateful.speculate.lookup_index import GRAMS, MAX_CANDIDATES, MAX_MATCH, LookupIndex
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
        if length:
            found.append((place, length))
    return found


def pairs(found: lookup_index.Found) -> list[tuple[int, int]]:
    return list(zip(found.places.tolist(), found.lengths.tolist(), strict=True))


def test_the_newest_place_comes_first_with_the_length_of_its_match() -> None:
    index = LookupIndex()
    index.extend(array(9, 1, 2, 3, 4, 8, 1, 2, 3, 5, 9, 1, 2, 3))
    assert pairs(index.find()) == [(9, 3), (4, 4)]


def test_longer_matches_come_before_shorter_ones() -> None:
    index = LookupIndex()
    long = [*range(20, 28)]
    index.extend(array(*long, 50, 27, 51, 26, 27, 52, *long))
    assert pairs(index.find()) == [(8, 8), (13, 2), (10, 1)]


def test_a_long_match_is_found_behind_many_short_ones() -> None:
    index = LookupIndex()
    index.extend(array(*range(10, 20), *[n for each in range(500, 900) for n in (each, 19)]))
    index.extend(array(*range(10, 20)))
    assert pairs(index.find())[0] == (10, 10)
    assert len(pairs(index.find())) == 1 + MAX_CANDIDATES


def test_a_text_that_is_too_short_has_no_places() -> None:
    index = LookupIndex()
    assert pairs(index.find()) == []
    index.extend(array(1))
    assert pairs(index.find()) == []
    index.extend(array(1))
    assert pairs(index.find()) == [(1, 1)]


def test_more_cannot_be_taken_back_than_there_is() -> None:
    index = LookupIndex()
    index.extend(array(1, 2))
    with pytest.raises(ValueError, match="cannot keep 3 of 2 tokens"):
        index.truncate(3)


def test_memory_is_at_most_56_bytes_a_token_right_after_growing() -> None:
    index = LookupIndex()
    index.extend(np.arange(100_000, dtype=np.int32))
    assert index.num_bytes <= 56 * 100_000
    index.extend(np.arange(131_072 - 100_000, dtype=np.int32))
    assert index.num_bytes == 28 * 131_072


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.lists(st.integers(0, 2), max_size=12)),
        st.tuples(st.just("truncate"), st.integers(0, 40)),
        st.tuples(st.just("long"), st.integers(0, 1)),
    ),
    max_size=12,
)


@settings(deadline=None)  # the first one compiles
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
    """In each chain all of them, or the newest ones: others count up to the limit, too."""
    known = MAX_MATCH + 1
    for gram in GRAMS:
        mine = [each for each in found if gram <= each[1] < known]
        right = [each for each in expected if gram <= each[1] < known]
        assert mine == right[: len(mine)]
        num_visited = sum(gram <= length for _, length in expected)
        assert len(mine) == len(right) or num_visited > MAX_CANDIDATES // 2
        known = gram
    assert found == [each for chain in by_chain(found) for each in chain]


def by_chain(found: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    limits = zip((MAX_MATCH + 1, *GRAMS), GRAMS, strict=False)
    return [[each for each in found if gram <= each[1] < known] for known, gram in limits]
