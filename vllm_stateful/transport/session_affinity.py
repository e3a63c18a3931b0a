# SPDX-License-Identifier: Apache-2.0
"""API process: which of several engine cores a turn goes to (data parallelism).

vLLM sends each request to the engine core with the least to do, so a conversation visits all of
them and its context is computed, and kept, once in each. Here a turn goes where its conversation
is, unless that engine core has so much more to do than another that computing the context again
is cheaper. Where a conversation is not known to be anywhere, vLLM chooses.

Nothing depends on being right: the engine core compares tokens, and a turn that comes to the wrong
one is computed there as a first turn.

Source: the bound is that of consistent hashing with bounded loads (arXiv:1608.01350); rendezvous
hashing (Thaler and Ravishankar 1998) is how several API servers agree without talking.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from enum import StrEnum
from hashlib import blake2b
from typing import Any, NamedTuple

from vllm_stateful.transport.prompt_ids import PromptTokenIds

MAX_KNOWN = 65536
"""Prompts, and conversations, of which it is remembered where they went."""

TOKENS_PER_REQUEST = 2048
"""A context of so many tokens outweighs one request more in an engine core's queue."""

MOST_OUTWEIGHED = 32
"""No context outweighs more requests than this, however long it is."""

SLACK, SHARE = 2.0, 0.25
"""What an engine core may have more to do than the least loaded, in requests and as a share of the
mean, before a conversation without any context leaves it."""


class Choice(StrEnum):
    """Why a turn went to its engine core, with several of them; the label of
    ``vllm_stateful_engine_choices_total``."""

    HOME = "home"
    """Its conversation is there."""
    HASHED = "hashed"
    """By the name of its conversation, as every API server would choose; it may be a new one."""
    MOVED = "moved"
    """vLLM chose: the engine core of its conversation had too much to do."""
    NEW = "new"
    """vLLM chose: its conversation is not known to be anywhere."""
    CLIENT = "client"
    """The client chose (``X-data-parallel-rank``)."""


class Chosen(NamedTuple):
    """What was decided for one turn.

    Attributes:
        engine: where to send it; None leaves that to vLLM.
        why: counted.
    """

    engine: Hashable | None
    why: Choice


class _Place(NamedTuple):
    engine: Hashable
    num_tokens: int


class SessionAffinity:
    """Where the conversations of one API process are. Used by one thread, the event loop.

    Args:
        is_shared: whether several API servers serve the same engine cores, so that a conversation
            may have gone somewhere without this one knowing.
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
        """Decide where a turn goes.

        Args:
            request_id: of the turn, as ``went`` will be told.
            prompt: its token ids, shape ``[num_tokens]``; None where they are not known here.
            name: of its conversation; None where nothing names it.
            loads: what each engine core has to do, in requests, by the engine core.
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
        """A turn was sent to an engine core, whoever chose it."""
        place = _Place(engine, 0 if prompt is None else len(prompt))
        if isinstance(prompt, PromptTokenIds) and prompt.version:
            _put(self._prompts, prompt.version, place)
        name = self._names.get(request_id)  # more than once, where several answers are asked for
        if name is not None:
            _put(self._conversations, name, place)

    def _place_of(self, prompt: list[int] | None, name: Hashable | None) -> _Place | None:
        """Where the longest known part of a turn's context is."""
        if isinstance(prompt, PromptTokenIds):
            same = self._prompts.get(prompt.version)
            if same is not None:
                return same
            # What shares its beginning with others, as agents share their tools, must spread.
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
    """The most that an engine core may have to do to be given a turn with such a context."""
    slack = max(SLACK, SHARE * sum(loads.values()) / len(loads))
    return min(loads.values()) + slack + min(num_tokens / TOKENS_PER_REQUEST, MOST_OUTWEIGHED)


def _rendezvous(name: str, engines: list[Hashable]) -> Hashable:
    """The engine core that every API server finds for a name, and few others when one is added."""

    def weight(place: int) -> bytes:
        return blake2b(f"{place}\0{name}".encode(), digest_size=8).digest()

    return engines[max(range(len(engines)), key=weight)]
