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

from vllm_stateful.prefix.radix_tree import Cuts, Known, RadixTree, common_prefix_len
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


SEGMENT = 2
"""A segment begins with each token of this id; its kind is its place in the sequence plus one."""


def cuts_of(tokens: list[int]) -> Cuts:
    starts = [place for place, token in enumerate(tokens) if token == SEGMENT]
    return Cuts(np.array(starts, np.int32), np.array([n + 1 for n in starts], np.uint8))


def kind_at(tokens: list[int], position: int) -> int:
    begun = [place for place in range(position + 1) if tokens[place] == SEGMENT]
    return begun[-1] + 1 if begun else 0


class RadixTreeModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index: RadixTree[Stored] = RadixTree()
        self.model: list[Stored] = []

    @rule(tokens=SEQUENCES)
    def insert(self, tokens: list[int]) -> None:
        stored = Stored(tokens)
        self.index.insert(array(tokens), stored, cuts=cuts_of(tokens))
        self.model.append(stored)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), more=SEQUENCES)
    def insert_continuation(self, data: st.DataObject, more: list[int]) -> None:
        parent = data.draw(st.sampled_from(self.model))
        num_kept = data.draw(st.integers(0, len(parent.tokens)))
        stored = Stored(parent.tokens[:num_kept] + more)
        num_known = data.draw(st.integers(0, num_kept))
        known = Known(parent, num_known)
        self.index.insert(array(stored.tokens[num_known:]), stored, known, cuts_of(stored.tokens))
        self.model.append(stored)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def shorten(self, data: st.DataObject) -> None:
        stored = data.draw(st.sampled_from(self.model))
        num_kept = data.draw(st.integers(1, len(stored.tokens)))
        self.index.shorten(stored, num_kept)
        del stored.tokens[num_kept:]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        position = data.draw(st.integers(0, len(self.model) - 1))
        self.index.remove(self.model.pop(position))

    @rule(data=st.data(), tokens=ANY)
    def match_is_the_longest_common_prefix_and_changes_nothing(
        self, data: st.DataObject, tokens: list[int]
    ) -> None:
        before = structure(self.index._root)
        known = None
        if self.model:
            parent = data.draw(st.sampled_from(self.model))
            num_shared = naive_common(parent.tokens, tokens)
            known = data.draw(st.sampled_from([None, Known(parent, num_shared)]))
        num_tokens, value, node = self.index.match(array(tokens), known)
        assert structure(self.index._root) == before
        assert num_tokens == max(
            (naive_common(tokens, stored.tokens) for stored in self.model), default=0
        )
        assert (value is None) == (num_tokens == 0)
        if value is not None:
            assert any(value is stored for stored in self.model)
            assert naive_common(tokens, value.tokens) == num_tokens
            assert node is not None
            assert node.start < num_tokens <= node.end
            assert any(value is owner for owner in self.index.values_below(node))
            for stored in self.model:
                shared = min(num_tokens, self.index.num_shared(stored, node))
                assert shared == naive_common(tokens, stored.tokens)

    @invariant()
    def values_are_complete(self) -> None:
        assert len(self.index) == len(self.model)
        assert sorted(map(id, self.index.values())) == sorted(map(id, self.model))

    @invariant()
    def nodes_are_few_and_none_is_idle(self) -> None:
        stack = list(self.index._root.children.values())
        while stack:
            node = stack.pop()
            only = list(node.children.values()) if len(node.children) == 1 else []
            passes_through = only and not only[0].is_cut
            assert node.values or node.children, "an empty leaf"
            assert node.values or not passes_through, "a node that only passes through"
            stack.extend(node.children.values())

    @invariant()
    def each_path_spells_its_values(self) -> None:
        stack: list[tuple[Any, list[int]]] = [(self.index._root, [])]
        while stack:
            node, path = stack.pop()
            assert node.start == len(path)
            path = path + node.tokens.tolist()
            assert node.end == len(path)
            assert all(value.tokens == path for value in node.values)
            for first, child in node.children.items():
                assert first == child.tokens[0]
                assert child.parent is node
                stack.append((child, path))

    @invariant()
    def nodes_end_where_segments_begin(self) -> None:
        for stored in self.model:
            for node in self.index.path_up(stored):
                assert node.is_cut == (node.tokens[0] == SEGMENT)
                assert SEGMENT not in node.tokens[1:].tolist()
                assert node.kind == kind_at(stored.tokens, node.start)

    @invariant()
    def the_own_tail_is_what_no_other_has(self) -> None:
        for stored in self.model:
            others = [other for other in self.model if other is not stored]
            shared = max((naive_common(stored.tokens, o.tokens) for o in others), default=0)
            own = list(self.index.own_tail(stored))
            assert (own[-1].start if own else len(stored.tokens)) == shared
            assert self.index.tokens_of(stored).tolist() == stored.tokens


TestRadixTreeModel = RadixTreeModel.TestCase
TestRadixTreeModel.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@given(left=ANY, right=ANY)
def test_common_prefix_len_counts_leading_equal_tokens(left: list[int], right: list[int]) -> None:
    assert common_prefix_len(array(left), array(right)) == naive_common(left, right)


@given(sequences=st.lists(SEQUENCES, min_size=1, max_size=12), order=st.randoms())
def test_removing_everything_in_any_order_leaves_only_the_root(
    sequences: list[list[int]], order: Any
) -> None:
    index: RadixTree[Stored] = RadixTree()
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
    index: RadixTree[str] = RadixTree()
    assert index.match(array([1, 2]))[:2] == (0, None)
    assert index.match(array([]))[:2] == (0, None)


def test_of_equal_matches_the_newest_wins() -> None:
    index: RadixTree[str] = RadixTree()
    index.insert(array([1, 2, 3]), "old")
    index.insert(array([1, 2, 4]), "new")
    assert index.match(array([1, 2, 9]))[:2] == (2, "new")
    index.insert(array([1, 2, 3]), "newest")
    assert index.match(array([1, 2, 9]))[:2] == (2, "newest")
    index.remove("newest")
    assert index.match(array([1, 2, 9]))[0] == 2


def test_a_sequence_that_ends_at_the_match_is_preferred_to_longer_ones() -> None:
    index: RadixTree[str] = RadixTree()
    index.insert(array([1, 2]), "short")
    index.insert(array([1, 2, 3, 4]), "long")
    assert index.match(array([1, 2, 9]))[:2] == (2, "short")


def test_values_are_told_apart_by_identity_not_by_equality() -> None:
    index: RadixTree[list[int]] = RadixTree()
    first, second = [0], [0]
    index.insert(array([1]), first)
    index.insert(array([1]), second)
    index.remove(first)
    (kept,) = index.values()
    assert kept is second


def test_a_value_is_stored_once_and_needs_a_token() -> None:
    index: RadixTree[str] = RadixTree()
    index.insert(array([1]), "value")
    with pytest.raises(ValueError, match="once"):
        index.insert(array([2]), "value")
    with pytest.raises(ValueError, match="one token"):
        index.insert(array([]), "other")
    assert list(index.values()) == ["value"]


def test_removing_what_is_not_stored_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        RadixTree[str]().remove("nothing")


def test_a_hundred_thousand_tokens_are_three_nodes_not_a_hundred_thousand() -> None:
    index: RadixTree[str] = RadixTree()
    history = np.arange(100_000, dtype=np.int32)
    index.insert(history, "one")
    index.insert(np.append(history[:50_000], np.int32(7)), "two")
    assert count_nodes(index._root) == 4
    assert index.match(history)[:2] == (100_000, "one")
