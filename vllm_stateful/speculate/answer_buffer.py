# SPDX-License-Identifier: Apache-2.0
"""Where the earlier answers of each agent stand in one flat buffer of the device.

The engine core decides, each worker only writes what it is told: tokens from a place on, and for
a request the part of the buffer in which its drafts may be looked up. An agent (tenant, LoRA
adapter, system message and tools) has one region, which is filled from its beginning, over and
over; `END` stands behind each answer and equals no token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vllm_stateful.types import TokenArray

LEAD_TOKENS = 6
"""Tokens before an answer that are kept with it, so that its beginning is found too."""

MAX_MATCH = 16
"""Tokens; longer matches are not told apart on the device."""

END = -1
"""Behind each answer: no draft goes on beyond it."""


BUFFER_TOKENS = 1 << 20
"""Tokens in the whole buffer: 4 MiB on each device."""

REGION_TOKENS = 1 << 14
"""Tokens of one agent."""


class Write(NamedTuple):
    """Tokens for the device.

    Attributes:
        start: place of the first in the buffer.
        tokens: int32, shape ``[num_tokens]``.
    """

    start: int
    tokens: TokenArray


class Span(NamedTuple):
    """A part of the buffer: ``num_tokens`` from ``start`` on."""

    start: int
    num_tokens: int


NOTHING = Span(0, 0)
"""Where a request without an agent may look."""


class LookupUpdate(NamedTuple):
    """What a step changes on the device.

    Attributes:
        writes: done before anything is looked up.
        spans: by request, where it may look from now on.
    """

    writes: list[Write]
    spans: dict[str, Span]


@dataclass(eq=False, slots=True)
class _Region:
    start: int
    filled: int = 0
    """Tokens from the start on that are this agent's."""
    head: int = 0
    """Where the next answer goes."""
    num_running: int = 0


class AnswerBuffer:
    """The regions of one buffer. Not thread-safe.

    Args:
        num_tokens: of the buffer.
        region_tokens: of one agent.

    Raises:
        ValueError: not one region fits, or one cannot hold an answer.
    """

    def __init__(self, num_tokens: int, region_tokens: int) -> None:
        if not LEAD_TOKENS + 2 <= region_tokens <= num_tokens:
            raise ValueError(f"{num_tokens} tokens hold no region of {region_tokens}")
        self._region_tokens = region_tokens
        starts = range(0, num_tokens - region_tokens + 1, region_tokens)
        self._free = list(reversed(starts))
        self._regions: OrderedDict[Hashable, _Region] = OrderedDict()

    def __len__(self) -> int:
        return len(self._regions)

    def begins(self, agent: Hashable) -> Span | None:
        """A turn of an agent runs: until it `ends`, nobody else gets what it reads.

        Returns:
            where it may look, empty while there is no answer; None when there is no region for
            the agent, and then nothing `ends`.
        """
        region = self._regions.get(agent)
        if region is None:
            region = self._take(agent)
        if region is None:
            return None
        self._regions.move_to_end(agent)
        region.num_running += 1
        return Span(region.start, region.filled)

    def ends(self, agent: Hashable, prompt: TokenArray, answer: TokenArray) -> Write | None:
        """A turn that began with a region is over.

        Args:
            agent: as it began.
            prompt: what was answered; its end is kept with the answer, so that the beginning of
                the next is found too.
            answer: shape ``[num_tokens]``; of one that is too long for a region, the end.

        Returns:
            what the device has to write; None for an answer without tokens.
        """
        region = self._regions[agent]
        region.num_running -= 1
        if not len(answer):
            return None
        room = self._region_tokens - 1
        tokens = np.concatenate([prompt[-LEAD_TOKENS:], answer])[-room:]
        tokens = np.append(tokens, END).astype(np.int32)
        if region.head + len(tokens) > self._region_tokens:
            region.head = 0
        write = Write(region.start + region.head, tokens)
        region.head += len(tokens)
        region.filled = max(region.filled, region.head)
        return write

    def span(self, agent: Hashable) -> Span:
        """Where a running agent may look now."""
        region = self._regions[agent]
        return Span(region.start, region.filled)

    def _take(self, agent: Hashable) -> _Region | None:
        """A region for an agent: a free one, or that of the agent that began longest ago."""
        if self._free:
            region = _Region(self._free.pop())
        else:
            idle = next((each for each, it in self._regions.items() if not it.num_running), None)
            if idle is None:
                return None
            region = _Region(self._regions.pop(idle).start)
        self._regions[agent] = region
        return region
