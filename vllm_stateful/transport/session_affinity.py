# SPDX-License-Identifier: Apache-2.0
"""API process: chooses the engine core that a turn goes to, of several (data parallelism).

vLLM sends each request to the engine core with the least to do. So a conversation visits all engine
cores, and its context is computed and kept once in each. Here a turn goes to the engine core that
has its conversation, unless that one has so much more to do than another that computing the context
again is cheaper. If no engine core is known to have the conversation, vLLM chooses.

A wrong choice only costs time: the engine core compares tokens, and a turn that comes to the wrong
engine core is computed there as a first turn.

Source: the bound on the load is that of consistent hashing with bounded loads (arXiv:1608.01350).
Several API servers agree without communication by rendezvous hashing (Thaler and Ravishankar 1998).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from enum import StrEnum
from hashlib import blake2b
from typing import Any, NamedTuple

from vllm_stateful.transport.prompt_ids import PromptTokenIds

MAX_KNOWN = 65536
"""Prompts, and also conversations, whose engine core is remembered."""

TOKENS_PER_REQUEST = 2048
"""Tokens of context that outweigh one more request in an engine core's queue."""

MOST_OUTWEIGHED = 32
"""The most requests that a context can outweigh, however long it is."""

SLACK, SHARE = 2.0, 0.25
"""How much more an engine core may have to do than the least loaded one before even a conversation
without context leaves it: this many requests, or this share of the mean load if that is more."""


class Choice(StrEnum):
    """Why a turn went to its engine core, of several; label of
    ``vllm_stateful_engine_choices_total``."""

    HOME = "home"
    """Its conversation is there."""
    HASHED = "hashed"
    """The name of its conversation decided, in the same way in every API server. The conversation
    may be new."""
    MOVED = "moved"
    """vLLM chose: the engine core of its conversation had too much to do."""
    NEW = "new"
    """vLLM chose: its conversation is not known to be anywhere."""
    CLIENT = "client"
    """The client chose (``X-data-parallel-rank``)."""


class Chosen(NamedTuple):
    """The decision for one turn.

    Attributes:
        engine: the engine core to send it to; None leaves the choice to vLLM.
        why: the reason, for the metrics.
    """

    engine: Hashable | None
    why: Choice


class _Place(NamedTuple):
    engine: Hashable
    num_tokens: int


class SessionAffinity:
    """Knows which engine core has each conversation of one API process. For the event loop only.

    Args:
        is_shared: whether several API servers use the same engine cores. Another API server may
            then have sent a conversation somewhere without this one knowing.
    """

    def __init__(self, *, is_shared: bool) -> None:
        self._is_shared = is_shared
        self._prompts: OrderedDict[int, _Place] = OrderedDict()
        self._conversations: OrderedDict[Hashable, _Place] = OrderedDict()
        self._names: OrderedDict[str, Hashable] = OrderedDict()

    def choose(
        self,
        request_id: str,
        prompt: list[int] | None,
        name: str | None,
        loads: Mapping[Hashable, float],
    ) -> Chosen:
        """Choose the engine core for a turn.

        Args:
            request_id: the id of the turn's request, as ``went`` gets it later.
            prompt: its token ids, shape ``[num_tokens]``; None if they are not known here.
            name: the name of its conversation; None if it has none.
            loads: the load of each engine core, in requests.
        """
        if name is not None:
            _put(self._names, request_id, name)
        place, why = self._place_of(prompt, name), Choice.HOME
        if place is None or place.engine not in loads:
            if name is None or not self._is_shared or not loads:
                return Chosen(None, Choice.NEW)
            place, why = _Place(_rendezvous(name, list(loads)), 0), Choice.HASHED
        if loads[place.engine] > _most(loads, place.num_tokens):
            return Chosen(None, Choice.MOVED)
        return Chosen(place.engine, why)

    def went(self, request_id: str, prompt: list[int] | None, engine: Hashable) -> None:
        """Remember the engine core that a turn was sent to, whoever chose it."""
        place = _Place(engine, 0 if prompt is None else len(prompt))
        if isinstance(prompt, PromptTokenIds) and prompt.version:
            _put(self._prompts, prompt.version, place)
        name = self._names.get(request_id)  # kept, as a request for several answers comes again
        if name is not None:
            _put(self._conversations, name, place)

    def _place_of(self, prompt: list[int] | None, name: Hashable | None) -> _Place | None:
        """The engine core that has the longest known part of a turn's context."""
        if isinstance(prompt, PromptTokenIds):
            same = self._prompts.get(prompt.version)
            if same is not None:
                return same
            # Only a parent that ends: prompts that merely share their beginning with others, as
            # agents share their tools, must be spread over the engine cores.
            parent = self._prompts.get(prompt.parent) if prompt.parent_ends else None
            if parent is not None:
                return _Place(parent.engine, prompt.num_parent_tokens)
        return self._conversations.get(name)


def _put(known: OrderedDict[Any, Any], key: Hashable, value: Hashable) -> None:
    known[key] = value
    known.move_to_end(key)
    while len(known) > MAX_KNOWN:
        known.popitem(last=False)


def _most(loads: Mapping[Hashable, float], num_tokens: int) -> float:
    """The load up to which an engine core gets a turn with ``num_tokens`` of context there."""
    slack = max(SLACK, SHARE * sum(loads.values()) / len(loads))
    return min(loads.values()) + slack + min(num_tokens / TOKENS_PER_REQUEST, MOST_OUTWEIGHED)


def _rendezvous(name: str, engines: list[Hashable]) -> Hashable:
    """The engine core that every API server finds for a name.

    When an engine core is added, few names move.
    """

    def weight(place: int) -> bytes:
        return blake2b(f"{place}\0{name}".encode(), digest_size=8).digest()

    return engines[max(range(len(engines)), key=weight)]
