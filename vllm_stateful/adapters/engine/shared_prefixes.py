# SPDX-License-Identifier: Apache-2.0
"""Finds the requests of a step that share leading blocks.

This is decided in the engine core, which knows the requests' blocks. The workers get the result
with vLLM's ``SchedulerOutput`` (`batch_prefixes`).
"""

from __future__ import annotations

from operator import attrgetter

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_stateful.adapters.engine.kv_blocks import StatefulKVCacheManager
from vllm_stateful.adapters.slots import on_step
from vllm_stateful.attention import shared_prefixes
from vllm_stateful.attention.plan import KEY_ALIGNMENT
from vllm_stateful.attention.shared_prefixes import Ints, SharedKeys, share

_id_of = attrgetter("block_id")


class SchedulerPrefixes:
    """Finds what the requests of one scheduler share.

    Args:
        manager: the manager of their blocks. It has one KV cache group.
    """

    def __init__(self, manager: StatefulKVCacheManager) -> None:
        (group,) = manager.coordinator.single_type_managers
        self._blocks = group.req_to_blocks
        self._block_size = int(group.block_size)
        self._least = -(-shared_prefixes.MIN_KEYS // self._block_size)
        self._counts: dict[str, int] = {}
        self._ids: dict[str, Ints] = {}
        """The ids of a request's computed blocks, as far as looked up, by request that shares
        some."""
        self._shared: tuple[SharedKeys, ...] = ()

    def step_begins(self, output: SchedulerOutput, requests: dict[str, Request]) -> None:
        """Attach to a scheduled step which requests share which blocks."""
        moved = {new.req_id for new in output.scheduled_new_reqs}
        moved |= output.scheduled_cached_reqs.resumed_req_ids
        counts = self._num_computed(output.num_scheduled_tokens, requests)
        if moved or counts != self._counts:
            self._counts = counts
            self._shared = self._share(moved)
        if self._shared:
            on_step(output).shared = self._shared

    def _num_computed(
        self, scheduled: dict[str, int], requests: dict[str, Request]
    ) -> dict[str, int]:
        """The number of whole blocks of each request that are computed before a step.

        Only blocks of the prompt count: its tokens are no drafts, so none of them are taken back.
        Requests with more new tokens than fit a shared tile are left out, for example while a
        prompt is computed.
        """
        size, most = self._block_size, shared_prefixes.MOST_MEMBER_ROWS
        return {
            name: min(request.num_prompt_tokens, request.num_computed_tokens - num_new) // size
            for name, num_new in scheduled.items()
            if num_new <= most and (request := requests[name])
        }

    def _share(self, moved: set[str]) -> tuple[SharedKeys, ...]:
        if self._block_size % KEY_ALIGNMENT:
            return ()
        before = {name: ids for name, ids in self._ids.items() if name not in moved}
        alike: dict[int, list[str]] = {}
        for name, count in self._counts.items():
            if count >= self._least:
                alike.setdefault(self._blocks[name][self._least - 1].block_id, []).append(name)
        names = [name for same in alike.values() if len(same) > 1 for name in same]
        self._ids = {name: self._computed(name, before) for name in names}
        groups = share([self._ids[name] for name in names], self._least)
        return tuple(
            SharedKeys(
                tuple(names[member] for member in group.members),
                group.num_blocks * self._block_size,
            )
            for group in groups
        )

    def _computed(self, name: str, before: dict[str, Ints]) -> Ints:
        """The ids of a request's computed blocks, which never change while it runs."""
        known, count = before.get(name), self._counts[name]
        if known is None:
            known = np.zeros(0, np.int32)
        if len(known) >= count:
            return known[:count]
        more = self._blocks[name][len(known) : count]
        new = np.fromiter(map(_id_of, more), np.int32, len(more))
        return np.concatenate([known, new])
