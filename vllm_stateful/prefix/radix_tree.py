# SPDX-License-Identifier: Apache-2.0
"""A radix tree over token ids that finds the stored sequence with the longest common prefix.

Edges are compressed runs of token ids (or of the bytes of a text: any one-dimensional integer
array will do). An edge is one segment of a conversation where the caller says where messages begin
(``Cuts``), and else as long as possible. ``match`` is read-only; ``insert`` splits edges and
``remove`` merges them again, but never across the beginning of a message. Every edge owns its
array: nothing that was removed is kept alive by a view.

Work is done only for what is new: a match or an insertion that starts at a stored sequence
(``Known``) touches what lies behind it.

Idea: RadixAttention (SGLang), section 4 of arXiv:2605.26289. The KV blocks are the values': any
sequence below a node holds KV for the whole path to it, so sharing them is metadata only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from vllm_stateful.prefix.boundaries import Cuts, Kind

V = TypeVar("V")

Ids = NDArray[np.integer[Any]]
"""Token ids (``types.TokenArray``) or the bytes of a text, shape ``[length]``."""

NUM_MARKED = 8
"""Levels above a new sequence in which it is the first to be found."""

NUM_PROBED = 32
"""Tokens in front of where ``Known`` ends that are compared all the same."""


NO_CUTS = Cuts.none()


class Node(Generic[V]):
    """One edge (``tokens`` leads here from the parent) and what hangs below it."""

    __slots__ = ("children", "data", "is_cut", "kind", "parent", "start", "tokens", "values")

    def __init__(
        self, tokens: Ids, parent: Node[V] | None, start: int, kind: int, is_cut: bool
    ) -> None:
        self.hold(tokens)
        self.parent = parent
        self.start = start
        """Position of its first token."""
        self.kind = kind
        """The kind of the segment that it lies in (``boundaries.Kind``)."""
        self.is_cut = is_cut
        """Whether a segment begins with its first token."""
        self.children: dict[int, Node[V]] = {}
        self.values: list[V] = []

    def hold(self, tokens: Ids) -> None:
        """Take a copy of the tokens; their bytes are at hand, as these compare fastest."""
        self.data = tokens.tobytes()
        self.tokens: Ids = np.frombuffer(self.data, tokens.dtype)

    @property
    def end(self) -> int:
        """One more than the position of its last token."""
        return self.start + len(self.tokens)


class Known(NamedTuple, Generic[V]):
    """A stored sequence whose first tokens are known to be those of the one that is asked for."""

    value: V
    num_tokens: int


class PrefixMatch(NamedTuple, Generic[V]):
    """The longest common prefix with any stored sequence."""

    num_tokens: int
    value: V | None
    """A sequence that shares those tokens; None when nothing is shared."""
    node: Node[V] | None = None
    """The last node of which at least one token is shared."""


def common_prefix_len(left: Ids, right: Ids) -> int:
    """The number of leading tokens that two arrays share."""
    length = min(len(left), len(right))
    differs = left[:length] != right[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length


class RadixTree(Generic[V]):
    """Maps token sequences to values; several values may share one sequence.

    Args:
        dtype: of all sequences; others are converted.
    """

    def __init__(self, dtype: type[np.integer[Any]] = np.int32) -> None:
        self._dtype = dtype
        self._root: Node[V] = Node(np.empty(0, dtype), None, 0, Kind.OTHER, False)
        self._leaf_of: dict[int, Node[V]] = {}

    def __len__(self) -> int:
        return len(self._leaf_of)

    # ---- looking -------------------------------------------------------------------------

    def match(self, tokens: Ids, known: Known[V] | None = None) -> PrefixMatch[V]:
        """Find the longest prefix of ``tokens`` that any stored sequence starts with.

        Args:
            tokens: shape ``[num_tokens]``.
            known: a stored sequence that shares so many of them; they are not compared again,
                but for the last ``NUM_PROBED``: if those differ, nothing is taken for known.

        Returns:
            The number of shared tokens and one value that shares them; of several one whose
            branch was inserted lately.
        """
        node, matched, below = self._enter(known, len(tokens))
        probed = below or node
        first = max(probed.start, matched - NUM_PROBED)
        expected = probed.tokens[first - probed.start : matched - probed.start]
        if not np.array_equal(expected, tokens[first:matched]):
            node, matched, below = self._root, 0, None
        node, matched, below = self._descend(tokens[matched:], matched, node, matched, below)
        if matched == 0:
            return PrefixMatch(0, None)
        last = below or node
        return PrefixMatch(matched, self._newest(last), last)

    def node_of(self, value: V) -> Node[V]:
        """The node that a stored sequence ends with. Raises KeyError when it is not stored."""
        return self._leaf_of[id(value)]

    def tokens_of(self, value: V) -> Ids:
        """A stored sequence, put together: O(length), for tests and reports."""
        path = [node.tokens for node in self.path_up(value)]
        return np.concatenate(path[::-1]) if path else np.empty(0, self._dtype)

    def path_up(self, value: V) -> Iterator[Node[V]]:
        """The nodes of a stored sequence, from its end to its beginning."""
        node = self.node_of(value)
        while node.parent is not None:
            yield node
            node = node.parent

    def num_shared(self, value: V, node: Node[V]) -> int:
        """How many leading tokens a stored sequence shares with the path to a node's end."""
        left = self.node_of(value)
        while left is not node:
            if left.start >= node.start and left.parent is not None:
                left = left.parent
            else:
                assert node.parent is not None
                node = node.parent
        return node.end

    def own_tail(self, value: V) -> Iterator[Node[V]]:
        """The nodes that only this sequence has, from its end towards its beginning."""
        below: Node[V] | None = None
        for node in self.path_up(value):
            others = len(node.values) - (below is None)
            if others or len(node.children) > (below is not None):
                return
            yield node
            below = node

    def values(self) -> Iterator[V]:
        """Every stored value, in no particular order."""
        return self.values_below(self._root)

    @staticmethod
    def values_below(node: Node[V]) -> Iterator[V]:
        """The owners of a node: every value whose sequence has it."""
        stack = [node]
        while stack:
            node = stack.pop()
            yield from node.values
            stack.extend(node.children.values())

    # ---- changing ------------------------------------------------------------------------

    def insert(
        self, tokens: Ids, value: V, known: Known[V] | None = None, cuts: Cuts = NO_CUTS
    ) -> None:
        """Store ``value``.

        Args:
            tokens: the sequence behind the tokens that are known, or all of it.
            value: is told apart by identity.
            known: a stored sequence that begins it.
            cuts: where segments begin; positions in the whole sequence. Those that lie in what is
                stored already are not looked at.

        Raises:
            ValueError: there are no tokens or this very value is stored already.
        """
        first = 0 if known is None else known.num_tokens
        if first + len(tokens) == 0 or id(value) in self._leaf_of:
            raise ValueError("a value needs at least one token and is stored once")
        place = self._enter(known, first + len(tokens))
        node, matched, below = self._descend(tokens, first, *place)
        if below is not None:
            node = self._split(below, matched)
        node = self._grow(node, tokens[matched - first :], cuts)
        node.values.append(value)
        self._leaf_of[id(value)] = node
        self._mark_newest(node)

    def remove(self, value: V) -> None:
        """Forget ``value``. Raises KeyError when it is not stored."""
        self._take_out(value, self._leaf_of.pop(id(value)))

    def shorten(self, value: V, num_tokens: int) -> None:
        """Keep only the first tokens of a stored sequence; at least one."""
        assert num_tokens > 0
        node, _, below = self._enter(Known(value, num_tokens), num_tokens)
        if below is not None:
            node = self._split(below, num_tokens)
        leaf = self._leaf_of[id(value)]
        node.values.append(value)
        self._leaf_of[id(value)] = node
        if leaf is not node:
            self._take_out(value, leaf)
        else:
            node.values.pop()

    # ---- walking -------------------------------------------------------------------------

    def _enter(self, known: Known[V] | None, limit: int) -> tuple[Node[V], int, Node[V] | None]:
        """Where what is known ends: the last whole node, position, a partly known child."""
        if known is None:
            return self._root, 0, None
        position = min(known.num_tokens, limit)
        node, below = self._leaf_of[id(known.value)], None
        assert position <= node.end
        while node.end > position:
            below = node
            assert node.parent is not None
            node = node.parent
        return node, position, below if node.end < position else None

    def _descend(
        self, tokens: Ids, first: int, node: Node[V], matched: int, below: Node[V] | None
    ) -> tuple[Node[V], int, Node[V] | None]:
        """Walk down from a place: the last whole node, tokens matched, a partly matched child.

        ``tokens`` are those from position ``first`` on.
        """
        if below is not None:
            rest = below.tokens[matched - below.start :]
            shared = common_prefix_len(rest, tokens[matched - first :])
            matched += shared
            if shared < len(rest):
                return node, matched, below
            node = below
        tokens = np.ascontiguousarray(tokens, self._dtype)
        view, data, size = tokens.data, tokens.tobytes(), tokens.itemsize
        place, end = matched - first, len(tokens)
        while place < end:
            child = node.children.get(view[place])
            if child is None:
                break
            if not data.startswith(child.data, place * size):
                place += common_prefix_len(child.tokens, tokens[place:])
                return node, first + place, child
            place += len(child.tokens)
            node = child
        return node, first + place, None

    @staticmethod
    def _newest(node: Node[V]) -> V:
        while not node.values:
            node = next(reversed(node.children.values()))
        return node.values[-1]

    @staticmethod
    def _mark_newest(node: Node[V]) -> None:
        """Move the end of the path to ``node`` to the end of its levels: ``_newest`` finds it."""
        for _ in range(NUM_MARKED):
            if node.parent is None:
                return
            siblings = node.parent.children
            if len(siblings) > 1:
                first = int(node.tokens[0])
                siblings[first] = siblings.pop(first)
            node = node.parent

    # ---- shape ---------------------------------------------------------------------------

    @staticmethod
    def _attach(child: Node[V]) -> None:
        assert child.parent is not None
        child.parent.children[int(child.tokens[0])] = child

    def _grow(self, node: Node[V], tokens: Ids, cuts: Cuts) -> Node[V]:
        """Hang new tokens behind a node, one child per segment. Returns the last."""
        tokens = np.asarray(tokens, self._dtype)
        begin, end = node.end, node.end + len(tokens)
        if begin == end:
            return node
        low, high = np.searchsorted(cuts.starts, [begin, end]).tolist()
        starts = cuts.starts[low:high].tolist()
        kinds = cuts.kinds[low:high].tolist()
        is_cut = bool(starts) and starts[0] == begin
        if not is_cut:
            kind = int(cuts.kinds[low - 1]) if low else node.kind
            starts, kinds = [begin, *starts], [kind, *kinds]
        for start, stop, kind in zip(starts, [*starts[1:], end], kinds, strict=True):
            part = tokens[start - begin : stop - begin]
            node = Node(part, node, start, kind, is_cut)
            self._attach(node)
            is_cut = True
        return node

    def _split(self, child: Node[V], position: int) -> Node[V]:
        """Cut the edge of ``child`` before a position; the new node above it."""
        size = position - child.start
        upper = Node(child.tokens[:size], child.parent, child.start, child.kind, child.is_cut)
        self._attach(upper)
        child.hold(child.tokens[size:])
        child.parent, child.start, child.is_cut = upper, position, False
        self._attach(child)
        return upper

    def _take_out(self, value: V, node: Node[V]) -> None:
        node.values = [kept for kept in node.values if kept is not value]
        self._prune(node)

    def _prune(self, node: Node[V]) -> None:
        """Drop empty leaves, and merge a node that only passes through a segment."""
        while not node.values and not node.children and node.parent is not None:
            del node.parent.children[int(node.tokens[0])]
            node = node.parent
        if node.parent is None or node.values or len(node.children) != 1:
            return
        (child,) = node.children.values()
        if child.is_cut:
            return
        child.hold(np.concatenate([node.tokens, child.tokens]))
        child.start, child.is_cut = node.start, node.is_cut
        child.parent = node.parent
        self._attach(child)
