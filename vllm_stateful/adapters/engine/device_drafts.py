# SPDX-License-Identifier: Apache-2.0
"""Decides which earlier answers the device may look drafts up in, beside a turn's own tokens.

Only the engine core knows which agent a turn belongs to, and what it answered. It sends the answers
to the worker with vLLM's ``SchedulerOutput``, and for each request the part of the worker's buffer
that holds the answers of the request's agent.
"""

from __future__ import annotations

from collections.abc import Hashable

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_stateful.adapters.engine.agents import agent_of, wish_of
from vllm_stateful.adapters.engine.kv_blocks import StatefulKVCacheManager
from vllm_stateful.adapters.engine.turn import Turn
from vllm_stateful.adapters.slots import on_step
from vllm_stateful.prefix.boundaries import BoundaryRules
from vllm_stateful.speculate.answer_buffer import (
    BUFFER_TOKENS,
    NOTHING,
    REGION_TOKENS,
    AnswerBuffer,
    LookupUpdate,
    Span,
    Write,
)
from vllm_stateful.types import token_array


class DeviceDrafts:
    """The earlier answers of one scheduler's agents.

    Args:
        manager: the KV cache manager that holds the turns.
        rules: where messages begin in token ids; None when that is not known.
        is_beside_head: whether a drafting head drafts, too. Then only the device knows which draft
            was verified, so drafts are not counted.
    """

    def __init__(
        self,
        manager: StatefulKVCacheManager,
        rules: BoundaryRules | None,
        *,
        is_beside_head: bool = False,
    ) -> None:
        self._is_beside_head = is_beside_head
        self.num_drafted = 0
        self.num_accepted = 0
        self._manager = manager
        self._rules = rules
        self._buffer = AnswerBuffer(BUFFER_TOKENS, REGION_TOKENS)
        self._running: dict[str, tuple[Hashable, Turn]] = {}
        self._writes: list[Write] = []
        self._changed: dict[str, Span] = {}

    def verified(self, num_drafted: int, num_accepted: int) -> None:
        """Count the drafts that a step verified for one request."""
        if not self._is_beside_head:
            self.num_drafted += num_drafted
            self.num_accepted += num_accepted

    def step_begins(self, output: SchedulerOutput) -> None:
        """Attach to a scheduled step what its workers have to know."""
        for new in output.scheduled_new_reqs:
            self._changed[new.req_id] = self._span(new.req_id)
        spans = {name: span for name, span in self._changed.items() if span != NOTHING}
        if spans or self._writes:
            on_step(output).lookup = LookupUpdate(self._writes, spans)
        if self._is_beside_head and output.scheduled_new_reqs:
            on_step(output).is_beside_head = True
        self._writes, self._changed = [], {}

    def ended(self, request: Request) -> None:
        """Make the answer of an ended request available to its agent's other requests."""
        found = self._running.pop(request.request_id, None)
        self._changed.pop(request.request_id, None)
        if found is None:
            return
        agent, turn = found
        answer = token_array(list(request.output_token_ids))
        write = self._buffer.ends(agent, turn.token_ids, answer)
        if write is not None:
            self._writes.append(write)
            same = [name for name, (other, _) in self._running.items() if other == agent]
            self._changed |= dict.fromkeys(same, self._buffer.span(agent))

    def withdraw(self, requests: dict[str, Request]) -> None:
        """Remove the drafts of requests that asked for none, so that none are verified."""
        for request in requests.values():
            if request.spec_token_ids and wish_of(request) is False:
                request.spec_token_ids = []

    def _span(self, name: str) -> Span:
        if name in self._running:  # it was preempted
            return self._buffer.span(self._running[name][0])
        turn = self._manager.turns.get(name)
        if turn is None:
            return NOTHING
        agent = agent_of(turn, self._rules)
        span = self._buffer.begins(agent)
        if span is not None:
            self._running[name] = (agent, turn)
        return NOTHING if span is None else span
