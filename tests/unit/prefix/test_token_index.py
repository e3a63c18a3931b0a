# SPDX-License-Identifier: Apache-2.0
"""The radix tree against a list of tuples. Three tokens only, so that edges split and merge."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_stateful.prefix.token_index import TokenIndex, common_prefix_len
from vllm_stateful.types import TokenArray

SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=8)
ANY = st.lists(st.integers(0, 2), max_size=10)


def array(tokens: Iterable[int]) -> TokenArray:
    return np.fromiter(tokens, np.int32)


def naive_common(left: Iterable[int], right: Iterable[int]) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count


@dataclass(eq=False)
class Stored:
    tokens: list[int]


def structure(node: Any) -> tuple[Any, ...]:
    """The whole tree below a node, with the order of children and values."""
    return (
        id(node),
        node.tokens.tolist(),
        [id(value) for value in node.values],
        [(first, structure(child)) for first, child in node.children.items()],
    )


def count_nodes(node: Any) -> int:
    return 1 + sum(count_nodes(child) for child in node.children.values())


class TokenIndexModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index: TokenIndex[Stored] = TokenIndex()
        self.model: list[Stored] = []

    @rule(tokens=SEQUENCES)
    def insert(self, tokens: list[int]) -> None:
        stored = Stored(tokens)
        self.index.insert(array(tokens), stored)
        self.model.append(stored)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), more=SEQUENCES)
    def insert_continuation(self, data: st.DataObject, more: list[int]) -> None:
        parent = data.draw(st.sampled_from(self.model))
        self.insert(parent.tokens[: data.draw(st.integers(0, len(parent.tokens)))] + more)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        position = data.draw(st.integers(0, len(self.model) - 1))
        self.index.remove(self.model.pop(position))

    @rule(tokens=ANY)
    def match_is_the_longest_common_prefix_and_changes_nothing(self, tokens: list[int]) -> None:
        before = structure(self.index._root)
        num_tokens, value = self.index.match(array(tokens))
        assert structure(self.index._root) == before
        assert num_tokens == max(
            (naive_common(tokens, stored.tokens) for stored in self.model), default=0
        )
        assert (value is None) == (num_tokens == 0)
        if value is not None:
            assert any(value is stored for stored in self.model)
            assert naive_common(tokens, value.tokens) == num_tokens

    @invariant()
    def values_are_complete(self) -> None:
        assert len(self.index) == len(self.model)
        assert sorted(map(id, self.index.values())) == sorted(map(id, self.model))

    @invariant()
    def nodes_are_few_and_none_is_idle(self) -> None:
        root = self.index._root
        assert count_nodes(root) <= 2 * len(self.model) + 1
        stack = list(root.children.values())
        while stack:
            node = stack.pop()
            assert node.values or len(node.children) >= 2, "a node that only passes through"
            stack.extend(node.children.values())

    @invariant()
    def each_path_spells_its_values(self) -> None:
        stack: list[tuple[Any, list[int]]] = [(self.index._root, [])]
        while stack:
            node, path = stack.pop()
            path = path + node.tokens.tolist()
            assert all(value.tokens == path for value in node.values)
            for first, child in node.children.items():
                assert first == child.tokens[0]
                assert child.parent is node
                stack.append((child, path))


TestTokenIndexModel = TokenIndexModel.TestCase
TestTokenIndexModel.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@given(left=ANY, right=ANY)
def test_common_prefix_len_counts_leading_equal_tokens(left: list[int], right: list[int]) -> None:
    assert common_prefix_len(array(left), array(right)) == naive_common(left, right)


@given(sequences=st.lists(SEQUENCES, min_size=1, max_size=12), order=st.randoms())
def test_removing_everything_in_any_order_leaves_only_the_root(
    sequences: list[list[int]], order: Any
) -> None:
    index: TokenIndex[Stored] = TokenIndex()
    stored = [Stored(tokens) for tokens in sequences]
    for value in stored:
        index.insert(array(value.tokens), value)
    order.shuffle(stored)
    for value in stored:
        index.remove(value)
    assert len(index) == 0
    assert list(index.values()) == []
    assert count_nodes(index._root) == 1


def test_an_empty_index_matches_nothing() -> None:
    index: TokenIndex[str] = TokenIndex()
    assert index.match(array([1, 2])) == (0, None)
    assert index.match(array([])) == (0, None)


def test_of_equal_matches_the_newest_wins() -> None:
    index: TokenIndex[str] = TokenIndex()
    index.insert(array([1, 2, 3]), "old")
    index.insert(array([1, 2, 4]), "new")
    assert index.match(array([1, 2, 9])) == (2, "new")
    index.insert(array([1, 2, 3]), "newest")
    assert index.match(array([1, 2, 9])) == (2, "newest")
    index.remove("newest")
    assert index.match(array([1, 2, 9]))[0] == 2


def test_a_sequence_that_ends_at_the_match_is_preferred_to_longer_ones() -> None:
    index: TokenIndex[str] = TokenIndex()
    index.insert(array([1, 2]), "short")
    index.insert(array([1, 2, 3, 4]), "long")
    assert index.match(array([1, 2, 9])) == (2, "short")


def test_values_are_told_apart_by_identity_not_by_equality() -> None:
    index: TokenIndex[list[int]] = TokenIndex()
    first, second = [0], [0]
    index.insert(array([1]), first)
    index.insert(array([1]), second)
    index.remove(first)
    (kept,) = index.values()
    assert kept is second


def test_a_value_is_stored_once_and_needs_a_token() -> None:
    index: TokenIndex[str] = TokenIndex()
    index.insert(array([1]), "value")
    with pytest.raises(ValueError, match="once"):
        index.insert(array([2]), "value")
    with pytest.raises(ValueError, match="one token"):
        index.insert(array([]), "other")
    assert list(index.values()) == ["value"]


def test_removing_what_is_not_stored_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        TokenIndex[str]().remove("nothing")


def test_a_hundred_thousand_tokens_are_three_nodes_not_a_hundred_thousand() -> None:
    index: TokenIndex[str] = TokenIndex()
    history = np.arange(100_000, dtype=np.int32)
    index.insert(history, "one")
    index.insert(np.append(history[:50_000], np.int32(7)), "two")
    assert count_nodes(index._root) == 4
    assert index.match(history) == (100_000, "one")
