# SPDX-License-Identifier: Apache-2.0
"""The loads of KV connectors: where they may begin, and what a failed load leaves.

A connector may load in chunks that are longer than a block. It loads each chunk from its beginning,
even if vLLM has a part of it. Such a connector is asked from the beginning of the chunk in which
our hit ends. If it reaches further than our hit, only what is before that position is shared, and
the load has all blocks behind it to itself. From any other position such a connector has nothing to
load.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from vllm_stateful.adapters.engine.turn import Turn

Computed = tuple[KVCacheBlocks, int, int]
"""Blocks, number of computed tokens, shared-prefix boundary: as vLLM's own method returns."""


Found = tuple[int | None, bool]
"""The number of tokens that a connector can load (None while it still looks), and whether it loads
them between steps."""


class _Load(NamedTuple):
    request: Request
    start: int
    end: int
    """The first token that the request computes itself."""

    @property
    def is_on(self) -> bool:
        """Whether no step that read the loaded KV has ended yet."""
        request = self.request
        return bool(request.num_computed_tokens - request.num_in_flight_tokens <= self.end)


class _Chunked:
    """A connector whose loads begin at multiples of a number of tokens; vLLM asks it through this.

    Args:
        connector: vLLM's. On this object, the method that says what it can load is replaced.
        unit: that number of tokens.
    """

    def __init__(self, connector: Any, unit: int) -> None:
        self._ask = connector.get_num_new_matched_tokens
        self._unit = unit
        self._unanswered: set[str] = set()
        connector.get_num_new_matched_tokens = self.answer

    def answer(self, request: Request, num_here: int) -> Found:
        """What the connector can load behind ``num_here`` tokens; nothing inside a chunk."""
        found: Found = self._ask(request, num_here)
        if not found[0] or self._start(num_here) == num_here:
            return found
        if request.request_id in self._unanswered:  # it was still looking when `start` asked
            return None, False
        return 0, False

    def start(self, request: Request, num_blocks: int, num_here: int) -> int:
        """Where a load begins that reaches further than ``num_here``; ``num_here`` if none does."""
        start = self._start(num_blocks)
        self._unanswered.discard(request.request_id)
        if start == num_blocks:
            return num_here
        num_loaded, _ = self._ask(request, start)
        if num_loaded is None:
            self._unanswered.add(request.request_id)
        return start if start + (num_loaded or 0) > num_here else num_here

    def _start(self, num_tokens: int) -> int:
        return num_tokens - num_tokens % self._unit

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended."""
        self._unanswered.discard(request_id)


class Loads:
    """The loads of one scheduler's KV connector.

    Args:
        connector: vLLM's, a supported one.
        parts: the connectors that do the work, each with its unit: the number of tokens at whose
            multiples its loads begin.
        block_size: the number of tokens in a block of the KV cache.
    """

    def __init__(self, connector: Any, parts: Sequence[tuple[Any, int]], block_size: int) -> None:
        self._connector = connector
        self._is_one = len(parts) == 1
        units = [(part, math.lcm(unit, block_size)) for part, unit in parts]
        self._chunked = [_Chunked(part, unit) for part, unit in units if unit != block_size]
        self._block_size = block_size
        self._running: dict[str, _Load] = {}

    def settle(
        self,
        request: Request,
        ours: Computed,
        truncate: Callable[[KVCacheBlocks, int], KVCacheBlocks],
    ) -> Computed:
        """Our hit of a request, or a shorter one if a load from there reaches further."""
        blocks, num_here, boundary = ours
        num_blocks = num_here - num_here % self._block_size  # vLLM itself drops a part of a block
        if not self._chunked or not num_blocks:
            return ours
        if not self._is_one:
            num_loaded, _ = self._connector.get_num_new_matched_tokens(request, num_blocks)
            if num_blocks + (num_loaded or 0) > num_here:
                return ours  # another connector loads from here on
        for each in self._chunked:
            start = each.start(request, num_blocks, num_here)
            if start < num_here:
                return truncate(blocks, start), start, boundary
        return ours

    def begins(self, request: Request, start: int, num_loaded: int) -> None:
        """Note that a request was given blocks, and which of them will be loaded."""
        if num_loaded:
            end = min(start + num_loaded, request.num_tokens - 1)
            self._running[request.request_id] = _Load(request, start, end)
        else:
            self.ended(request)

    def ended(self, request: Request) -> bool:
        """Note that a request gives up its blocks; whether KV was still loaded into them."""
        for each in self._chunked:
            each.forget(request.request_id)
        load = self._running.pop(request.request_id, None)
        return load is not None and load.is_on

    def fail(
        self,
        output: KVConnectorOutput,
        turns: Mapping[str, Turn],
        tables: Mapping[str, Any],
    ) -> None:
        """Read which blocks a step could not load, before vLLM does.

        What was here before the load is right, whatever a connector says about its blocks. So those
        blocks are taken out of the report, and nothing is computed again in place. Other turns that
        shared what was loaded are not kept.

        Args:
            output: vLLM's report. It is changed.
            turns: the running turns, by request.
            tables: the block tables of requests.
        """
        here: set[int] = set()
        loaded: dict[str, set[int]] = {}
        for request_id, load in self._running.items():
            if load.is_on:
                ids = [block.block_id for block in tables.get(request_id, ())]
                first = load.start // self._block_size
                here.update(ids[:first])
                loaded[request_id] = set(ids[first:])
        output.invalid_block_ids -= here.difference(*loaded.values())
        for request_id, turn in turns.items():
            held = {block.block_id for block in tables.get(request_id, ())}
            lost = held & output.invalid_block_ids
            turn.has_failed |= bool(lost - loaded.get(request_id, set()))
