# SPDX-License-Identifier: Apache-2.0
"""Holds waiting requests back while another request computes their prefix.

vLLM asks for each waiting request whether it can run yet (``_handle_blocked_waiting_request``): a
grammar may still compile, or KV may be on its way. A request that waits for a prefix is passed over
in the same way. It keeps its place, and the requests behind it do not wait for it.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.request import Request, RequestStatus

from vllm_stateful.adapters.engine.kv_blocks import StatefulKVCacheManager
from vllm_stateful.prefix.grouped_prefill import MIN_SAVED, PrefillGroups


class SchedulerPrefills:
    """Groups the prefills of one scheduler.

    Args:
        scheduler: a scheduler whose KV cache manager is stateful.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._manager: StatefulKVCacheManager = scheduler.kv_cache_manager
        block_size = self._manager.store.block_size
        self.groups = PrefillGroups(block_size, MIN_SAVED, self._num_computed)
        self._noted: set[Request] = set()

    def waits(self, request: Request) -> bool:
        """Whether a request that could be admitted in this step should wait for another."""
        self._note_running()
        if not len(self.groups) or request.status != RequestStatus.WAITING:
            return False
        if request.num_computed_tokens:  # it holds KV that was loaded for it
            return False
        if self.groups.follows(request.request_id):
            return self.groups.goes_on(request.request_id)
        turn = self._manager.turn_of(request)
        if turn is None:
            return False
        session, limit = turn.named, request.num_tokens - 1

        def num_here() -> int:
            match = self._manager.store.match(session, turn.prompt, limit, turn.prompt_base)
            return match.num_tokens

        return self.groups.waits(request.request_id, session.identity, turn.prompt, num_here)

    def ended(self, request: Request) -> None:
        """Forget a request that has ended in any way."""
        self.groups.forget(request.request_id)

    def _note_running(self) -> None:
        """Note which prompts are computed in chunks now, including those admitted in this step."""
        prefills: set[Request] = self._scheduler._inflight_prefills
        if prefills == self._noted:
            return
        loading = {r for r in prefills if r.status == RequestStatus.WAITING_FOR_REMOTE_KVS}
        self._noted = prefills - loading
        running = {request.request_id: request for request in self._noted}
        known = self.groups.known()
        self.groups.ends(known - running.keys())
        for name in running.keys() - known:
            turn = self._manager.turns.get(name)
            if turn is not None:
                self.groups.begins(name, turn.session.identity, turn.prompt)

    def _num_computed(self, name: Any) -> int:
        return self._manager.num_tokens_hashed(name)
