# SPDX-License-Identifier: Apache-2.0
"""Whether an answer's reasoning will stand in the next prompt: learned from the prompts.

A chat template may drop it (Qwen 3 does, except inside a loop of tool calls), and so may a
client. The KV of reasoning that is dropped, and of all behind it, is never used again. What the
template and the client do together is seen when the next turn comes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vllm_stateful.prefix.boundaries import Kind
from vllm_stateful.prefix.radix_tree import Node
from vllm_stateful.types import TokenArray

ANSWER_KINDS = (Kind.ASSISTANT, Kind.REASONING, Kind.TOOL_CALL)

MIN_TOKENS = 16
"""Shorter reasoning is ignored: Qwen's templates write an empty one."""

NUM_HEAD = 8
"""Tokens by which reasoning is recognized in the next prompt."""

MIN_SEEN = 3
"""Turns that must be seen before anything is predicted."""

SHARE = 0.9
"""The share of those turns that must have dropped the reasoning."""

DECAY = 0.95
"""The weight of a turn, relative to the turn after it."""

MAX_KINDS = 1024
"""Pairs of tenant and kind of wait; the least recently used pair is forgotten."""


class Reasoning(NamedTuple):
    """Where the reasoning of an answer begins."""

    start: int
    head: TokenArray
    """Its first ``NUM_HEAD`` tokens."""

    def stands_in(self, prompt: TokenArray) -> bool:
        """Whether a prompt that shares all before it has it as well."""
        return np.array_equal(prompt[self.start : self.start + len(self.head)], self.head)


def reasoning_of(path_up: Iterable[Node[Any]]) -> Reasoning | None:
    """Where the reasoning of the last answer begins; None when it is short or there is none.

    Args:
        path_up: the nodes of prompt and answer, from the end to the beginning.
    """
    nodes: list[Node[Any]] = []
    for node in path_up:
        if node.kind not in ANSWER_KINDS:
            break
        nodes = [node, *nodes] if node.kind == Kind.REASONING else nodes
    if not nodes or not nodes[0].is_cut or not nodes[0].start:
        return None
    head = np.concatenate([node.tokens[:MIN_TOKENS] for node in nodes[:MIN_TOKENS]])
    if len(head) < MIN_TOKENS:
        return None
    return Reasoning(nodes[0].start, np.array(head[:NUM_HEAD], np.int32))


@dataclass(slots=True)
class _Seen:
    dropped: float = 0.0
    kept: float = 0.0


class ReasoningHabits:
    """What was seen of each tenant, by kind of wait. Not thread-safe."""

    def __init__(self) -> None:
        self._seen: OrderedDict[Hashable, _Seen] = OrderedDict()

    def saw(self, tenant: Hashable, wait: Hashable, *, kept: bool) -> None:
        """A turn came whose last answer had reasoning."""
        seen = self._seen.setdefault((tenant, wait), _Seen())
        seen.dropped *= DECAY
        seen.kept *= DECAY
        if kept:
            seen.kept += 1
        else:
            seen.dropped += 1
        self._seen.move_to_end((tenant, wait))
        while len(self._seen) > MAX_KINDS:
            self._seen.popitem(last=False)

    def drops(self, tenant: Hashable, wait: Hashable) -> bool:
        """Whether the next turn is expected to have dropped it."""
        seen = self._seen.get((tenant, wait), _Seen())
        total = seen.dropped + seen.kept
        return total > DECAY**MIN_SEEN * MIN_SEEN and seen.dropped >= SHARE * total
