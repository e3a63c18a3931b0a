# SPDX-License-Identifier: Apache-2.0
"""A prefix that several waiting turns share is computed once: the others wait for it.

Stock vLLM shares what one step computes at once. But where a long prompt is computed in chunks that
leave room for others (``--long-prefill-token-threshold``), each of eight sub-agents would take up
its parent's prefix where the one before it stands, and compute the rest beside it. Here it waits
while another computes what it needs, chunk by chunk, and joins in the very step in which the last
shared block is computed: as early as if it had computed the prefix itself, or one step later.

Source: arXiv:2605.26289 (8-way burst), arXiv:2605.13784 (prefix-aware grouped prefill).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from vllm_stateful.prefix.radix_tree import RadixTree
from vllm_stateful.types import Identity, TokenArray

MIN_SAVED = 256
"""Tokens that waiting must save."""

MAX_STEPS = 512
"""Steps that anyone waits at most, whatever the progress."""


@dataclass(eq=False, slots=True)
class _Prefill:
    """A prompt that is being computed."""

    name: Hashable
    identity: Identity


@dataclass(slots=True)
class _Waiting:
    leader: _Prefill
    num_shared: int
    num_computed: int = -1
    """What the leader had computed at the last look."""
    num_steps: int = 0


class PrefillGroups:
    """Turns that compute a prefix, and turns that wait for one. Not thread-safe.

    Args:
        block_size: tokens per block; only full ones are shared while they are computed.
        min_saved: tokens that waiting must save.
        num_computed: tokens of a running prompt that will be in the cache after this step.
    """

    def __init__(
        self, block_size: int, min_saved: int, num_computed: Callable[[Hashable], int]
    ) -> None:
        self.num_joined = 0
        """Turns that waited and then found the prefix computed."""
        self._block_size = block_size
        self._min_saved = min_saved
        self._num_computed = num_computed
        self._running: dict[Hashable, _Prefill] = {}
        self._trees: dict[Identity, RadixTree[_Prefill]] = {}
        self._waiting: dict[Hashable, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._running)

    def known(self) -> frozenset[Hashable]:
        """The names of the prompts that are being computed."""
        return frozenset(self._running)

    def begins(self, name: Hashable, identity: Identity, tokens: TokenArray) -> None:
        """A prompt is being computed in several chunks."""
        if name in self._running:
            return
        made = self._running[name] = _Prefill(name, identity)
        self._trees.setdefault(identity, RadixTree()).insert(tokens, made)

    def ends(self, names: Iterable[Hashable]) -> None:
        """These are computed, or are not any more."""
        for name in names:
            prefill = self._running.pop(name, None)
            if prefill is None:
                continue
            tree = self._trees[prefill.identity]
            tree.remove(prefill)
            if not len(tree):
                del self._trees[prefill.identity]

    def forget(self, name: Hashable) -> None:
        """A turn does not wait any more."""
        self._waiting.pop(name, None)

    def waits(
        self, name: Hashable, identity: Identity, tokens: TokenArray, num_here: Callable[[], int]
    ) -> bool:
        """Whether a turn should wait in this step. Asked once per step, in order of admission.

        Args:
            name: the turn's.
            identity: only prompts of the same one are shared.
            tokens: its prompt, shape ``[num_tokens]``.
            num_here: says how many of them are in the cache already, whoever computes now.
        """
        if self.follows(name):
            return self.goes_on(name)
        waiting = self._follow(identity, tokens, num_here)
        if waiting is None:
            self.forget(name)
            return False
        self._waiting[name] = waiting
        return self.goes_on(name)

    def follows(self, name: Hashable) -> bool:
        """Whether a turn waits already, for one that is still being computed."""
        waiting = self._waiting.get(name)
        return waiting is not None and (self._running.get(waiting.leader.name) is waiting.leader)

    def _follow(
        self, identity: Identity, tokens: TokenArray, num_here: Callable[[], int]
    ) -> _Waiting | None:
        tree = self._trees.get(identity)
        if tree is None:
            return None
        match = tree.match(tokens[:-1])
        if match.value is None:
            return None
        num_shared = match.num_tokens - match.num_tokens % self._block_size
        done = self._num_computed(match.value.name)
        if num_shared - done < self._min_saved or num_shared - num_here() < self._min_saved:
            return None
        return _Waiting(match.value, num_shared)

    def goes_on(self, name: Hashable) -> bool:
        """Whether a turn that follows should wait in this step too."""
        waiting = self._waiting[name]
        done = self._num_computed(waiting.leader.name)
        has_all = done >= waiting.num_shared
        stands_still = done <= waiting.num_computed
        if has_all or stands_still or waiting.num_steps >= MAX_STEPS:
            self.num_joined += has_all
            self.forget(name)
            return False
        waiting.num_computed = done
        waiting.num_steps += 1
        return True
