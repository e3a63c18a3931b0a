# SPDX-License-Identifier: Apache-2.0
"""Where the earlier answers of each agent are in one flat buffer on the device.

The engine core decides and each worker only applies what it is told: which tokens to write at which
place, and in which part of the buffer a request may look up its drafts. An agent (tenant, LoRA
adapter, system message and tools) has one region. It is filled from its beginning, and again from
its beginning when it is full. `END`, which equals no token, follows each answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vllm_stateful.types import TokenArray

LEAD_TOKENS = 6
"""Tokens of the prompt that are kept before an answer, so that its beginning can be found, too."""

MAX_MATCH = 16
"""Tokens up to which the length of a match is measured on the device."""

END = -1
"""Follows each answer. No draft goes on beyond it."""


BUFFER_TOKENS = 1 << 20
"""Tokens in the whole buffer: 4 MiB on each device."""

REGION_TOKENS = 1 << 14
"""Tokens in the region of one agent."""


class Write(NamedTuple):
    """Tokens to write to the device.

    Attributes:
        start: the place of the first token in the buffer.
        tokens: int32, shape ``[num_tokens]``.
    """

    start: int
    tokens: TokenArray


class Span(NamedTuple):
    """A part of the buffer: ``num_tokens`` from ``start`` on."""

    start: int
    num_tokens: int


NOTHING = Span(0, 0)
"""Where a request without an agent may look: nowhere."""


class LookupUpdate(NamedTuple):
    """What a step changes on the device.

    Attributes:
        writes: written before any draft is looked up.
        spans: for each request, where it may look from now on.
    """

    writes: list[Write]
    spans: dict[str, Span]


@dataclass(eq=False, slots=True)
class _Region:
    start: int
    filled: int = 0
    """Tokens from the start on that this agent has written."""
    head: int = 0
    """Where the next answer goes, counted from the start."""
    num_running: int = 0


class AnswerBuffer:
    """The regions of one buffer. Not thread-safe.

    Args:
        num_tokens: tokens in the buffer.
        region_tokens: tokens in the region of one agent.

    Raises:
        ValueError: the buffer holds no region, or a region holds no answer.
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
        """Begin a turn of an agent. Until it `ends`, no other agent gets the region.

        Returns:
            Where the turn may look; empty while the agent has no answer. None when there is no
            region for the agent; `ends` must not be called then.
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
        """End a turn that began with a region, and add its answer.

        Args:
            agent: the agent with which the turn began.
            prompt: the prompt of the answer. Its last tokens are kept before the answer, so that
                the beginning of a like answer is found, too.
            answer: shape ``[num_tokens]``. Of an answer too long for a region the end is kept.

        Returns:
            What the device has to write; None for an answer without tokens.
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
        """Where the running turns of an agent may look now."""
        region = self._regions[agent]
        return Span(region.start, region.filled)

    def _take(self, agent: Hashable) -> _Region | None:
        """Take a free region, or that of the idle agent whose last turn began longest ago.

        Returns:
            None when all regions are in use.
        """
        if self._free:
            region = _Region(self._free.pop())
        else:
            idle = next((each for each, it in self._regions.items() if not it.num_running), None)
            if idle is None:
                return None
            region = _Region(self._regions.pop(idle).start)
        self._regions[agent] = region
        return region
