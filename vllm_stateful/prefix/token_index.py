# SPDX-License-Identifier: Apache-2.0
"""A radix tree over token ids that finds the stored sequence with the longest common prefix.

Edges are compressed runs of token ids (or of the bytes of a text: any one-dimensional integer
array will do). ``match`` is read-only; ``insert`` splits edges and ``remove`` merges them again,
so the tree never holds more nodes than twice its sequences. Every edge owns its array: nothing
that was removed is kept alive by a view.
Idea: RadixAttention (SGLang), section 4 of arXiv:2605.26289. The KV blocks themselves are
not in the tree: any sequence below the matching point holds KV for the whole match.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

V = TypeVar("V")

Ids = NDArray[np.integer[Any]]
"""Token ids (``types.TokenArray``) or the bytes of a text, shape ``[length]``."""


class PrefixMatch(NamedTuple, Generic[V]):
    """The longest common prefix with any stored sequence."""

    num_tokens: int
    value: V | None
    """A sequence that shares those tokens; None when nothing is shared."""


def common_prefix_len(left: Ids, right: Ids) -> int:
    """The number of leading tokens that two arrays share."""
    length = min(len(left), len(right))
    differs = left[:length] != right[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length


class _Node(Generic[V]):
    """One edge (``tokens`` leads here from the parent) and what hangs below it."""

    __slots__ = ("children", "parent", "tokens", "values")

    def __init__(self, tokens: Ids, parent: _Node[V] | None) -> None:
        self.tokens = tokens
        self.parent = parent
        self.children: dict[int, _Node[V]] = {}
        self.values: list[V] = []


class TokenIndex(Generic[V]):
    """Maps token sequences to values; several values may share one sequence."""

    def __init__(self) -> None:
        self._root: _Node[V] = _Node(np.empty(0, np.int32), None)
        self._leaf_of: dict[int, _Node[V]] = {}

    def __len__(self) -> int:
        return len(self._leaf_of)

    def match(self, tokens: Ids) -> PrefixMatch[V]:
        """Find the longest prefix of ``tokens`` that any stored sequence starts with.

        Args:
            tokens: shape ``[num_tokens]``.

        Returns:
            The number of shared tokens and one value that shares them; of several the most
            recently inserted branch.
        """
        node, matched, below = self._descend(tokens)
        if matched == 0:
            return PrefixMatch(0, None)
        return PrefixMatch(matched, self._newest(below or node))

    def insert(self, tokens: Ids, value: V) -> None:
        """Store ``value`` under ``tokens``.

        Raises:
            ValueError: ``tokens`` is empty or this very value is stored already.
        """
        if len(tokens) == 0 or id(value) in self._leaf_of:
            raise ValueError("a value needs at least one token and is stored once")
        node, matched, below = self._descend(tokens)
        if below is not None:
            node = self._split(below, matched - self._depth(node))
        if matched < len(tokens):
            child: _Node[V] = _Node(tokens[matched:].copy(), node)
            self._attach(child)
            node = child
        node.values.append(value)
        self._leaf_of[id(value)] = node
        self._mark_newest(node)

    def remove(self, value: V) -> None:
        """Forget ``value``. Raises KeyError when it is not stored."""
        node = self._leaf_of.pop(id(value))
        node.values = [kept for kept in node.values if kept is not value]
        self._prune(node)

    def values(self) -> Iterator[V]:
        """Every stored value, in no particular order."""
        stack = [self._root]
        while stack:
            node = stack.pop()
            yield from node.values
            stack.extend(node.children.values())

    def _descend(self, tokens: Ids) -> tuple[_Node[V], int, _Node[V] | None]:
        """Walk down: the last fully matched node, tokens matched, a partly matched child."""
        node, matched = self._root, 0
        while matched < len(tokens):
            child = node.children.get(int(tokens[matched]))
            if child is None:
                break
            shared = common_prefix_len(child.tokens, tokens[matched:])
            matched += shared
            if shared < len(child.tokens):
                return node, matched, child
            node = child
        return node, matched, None

    def _depth(self, node: _Node[V]) -> int:
        depth = 0
        walk: _Node[V] | None = node
        while walk is not None:
            depth += len(walk.tokens)
            walk = walk.parent
        return depth

    @staticmethod
    def _newest(node: _Node[V]) -> V:
        while not node.values:
            node = next(reversed(node.children.values()))
        return node.values[-1]

    @staticmethod
    def _attach(child: _Node[V]) -> None:
        assert child.parent is not None
        child.parent.children[int(child.tokens[0])] = child

    def _split(self, child: _Node[V], offset: int) -> _Node[V]:
        """Cut the edge of ``child`` after ``offset`` tokens; the new node in between."""
        upper: _Node[V] = _Node(child.tokens[:offset].copy(), child.parent)
        self._attach(upper)
        child.tokens = child.tokens[offset:].copy()
        child.parent = upper
        self._attach(child)
        return upper

    def _prune(self, node: _Node[V]) -> None:
        """Drop an empty leaf, and merge a node that only passes through."""
        parent = node.parent
        if parent is None or node.values:
            return
        if not node.children:
            del parent.children[int(node.tokens[0])]
            self._prune(parent)
        elif len(node.children) == 1:
            (child,) = node.children.values()
            child.tokens = np.concatenate([node.tokens, child.tokens])
            child.parent = parent
            parent.children[int(child.tokens[0])] = child

    @staticmethod
    def _mark_newest(node: _Node[V]) -> None:
        """Move the path to ``node`` to the end of each level, so that ``_newest`` finds it."""
        while node.parent is not None:
            siblings = node.parent.children
            first = int(node.tokens[0])
            siblings[first] = siblings.pop(first)
            node = node.parent
