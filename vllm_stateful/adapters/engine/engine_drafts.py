# SPDX-License-Identifier: Apache-2.0
"""Drafts for vLLM's speculative decoding, made where the sessions are: in the engine core.

vLLM asks its worker for drafts after each step and hands them to the scheduler, which has the next
step verify them; here the scheduler fills them in. Beside a drafting head it keeps the head's
drafts but where the session's are better (`speculate/beside_head.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm.platforms import current_platform
from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request

from vllm_stateful.adapters.engine.agents import agent_of, wish_of
from vllm_stateful.adapters.engine.kv_blocks import StatefulKVCacheManager
from vllm_stateful.prefix.boundaries import BoundaryRules
from vllm_stateful.speculate.beside_head import REST_LOOKS, BesideHead
from vllm_stateful.speculate.session_drafts import SessionDrafts, compile_now
from vllm_stateful.speculate.step_costs import LEAST_CHANCE, PRIOR_SECONDS, StepCosts
from vllm_stateful.types import SessionKey, token_array

MAX_BYTES = 512 << 20
"""For the indexes of waiting sessions, and as much for the answers of agents."""

RATE_DECAY = 0.98
"""How much less each earlier step counts in what a step accepts."""


LOOK_WEIGHT = 0.05
"""How much the newest step counts in what looks and steps take."""


class EngineDrafts:
    """The drafts of one scheduler's turns.

    Args:
        manager: whose turns they are.
        rules: where messages begin in token ids; None when that is not known.
        max_tokens: of one draft (``num_speculative_tokens``).
        is_beside_head: whether the worker's drafting head proposes drafts, too.
    """

    def __init__(
        self,
        manager: StatefulKVCacheManager,
        rules: BoundaryRules | None,
        max_tokens: int,
        *,
        is_beside_head: bool = False,
    ) -> None:
        compile_now()
        self.costs = StepCosts()
        self.is_beside_head = is_beside_head
        self.drafts = SessionDrafts(MAX_BYTES, max_tokens if is_beside_head else 0)
        self.greedy_only: bool = current_platform.is_cpu()
        """vLLM 0.32 on a CPU samples from garbage, or ends the engine, when a step verifies drafts
        and any of its turns is not greedy: ``rejection_sampler.expand_batch_to_tokens`` leaves
        temperatures, top_k and top_p unset there (vllm-project/vllm#42638), with any drafts."""
        self._manager = manager
        self._rules = rules
        self._max_tokens = max_tokens
        self._drafted_a_step = self._accepted_a_step = 0.0
        self._started: tuple[float, int, int] | None = None
        self._look_seconds = 0.0
        """That one look beside a head takes, of late."""
        self._step_seconds = PRIOR_SECONDS
        """That a step that only decodes takes, of late."""
        self._rests = 0
        """Steps without a look that are left."""

    def withdraw(self, requests: dict[str, Request]) -> None:
        """A step is about to be scheduled, and a turn may have come that drafts would hurt."""
        if self._is_verifying_unsafe(requests):
            for name, request in requests.items():
                if request.spec_token_ids:
                    request.spec_token_ids = []
                    self.drafts.withdraw(name)

    def _is_verifying_unsafe(self, requests: dict[str, Request]) -> bool:
        return self.greedy_only and any(
            request.sampling_params is not None
            and request.sampling_params.sampling_type != SamplingType.GREEDY
            for request in requests.values()
        )

    def step_begins(self, output: SchedulerOutput) -> None:
        """A step was scheduled: one that only decodes is timed."""
        drafted = output.scheduled_spec_decode_tokens
        decodes = all(
            num == 1 + len(drafted.get(name, ()))
            for name, num in output.num_scheduled_tokens.items()
        )
        is_timed = decodes and not output.scheduled_new_reqs and output.num_scheduled_tokens
        if not is_timed:
            self._started = None
            return
        rows, attended = output.total_num_scheduled_tokens, 0
        if not self.is_beside_head:  # there a step has the head's rows, whichever draft they are
            computed = output.scheduled_cached_reqs
            attended = sum(
                num * output.num_scheduled_tokens[name]
                for name, num in zip(computed.req_ids, computed.num_computed_tokens, strict=True)
            )
        self._started = (time.perf_counter(), rows, attended)

    def step_ends(self) -> None:
        """Its output is here."""
        if self._started is not None:
            began, rows, attended = self._started
            seconds = time.perf_counter() - began
            if not self.is_beside_head:
                self.costs.saw(rows, attended, seconds)
            self._step_seconds += LOOK_WEIGHT * (seconds - self._step_seconds)
            self._started = None

    def fill(self, proposed: DraftTokenIds, requests: dict[str, Request]) -> DraftTokenIds:
        """The drafts of the requests that a step has run, in the place of the worker's."""
        if self.drafts.beside is not None:
            return self._fill_beside(proposed, requests, self.drafts.beside)
        drafted, accepted = self.drafts.num_drafted, self.drafts.num_accepted
        running = [name for name in proposed.req_ids if self._is_decoding(requests.get(name))]
        for name in running:
            self._catch_up(requests[name])
        drafted, accepted = self.drafts.num_drafted - drafted, self.drafts.num_accepted - accepted
        self._drafted_a_step += (1 - RATE_DECAY) * (drafted - self._drafted_a_step)
        self._accepted_a_step += (1 - RATE_DECAY) * (accepted - self._accepted_a_step)
        is_unsafe = self._is_verifying_unsafe(requests)
        made = {} if is_unsafe else self._drafts([requests[name] for name in running])
        return DraftTokenIds(proposed.req_ids, [made.get(name, []) for name in proposed.req_ids])

    def _fill_beside(
        self, proposed: DraftTokenIds, requests: dict[str, Request], beside: BesideHead
    ) -> DraftTokenIds:
        """The head's drafts, and those of sessions where they are better.

        While looks do not pay, only every few steps has one. What it found is compared with what
        came when the next one is made: it may pay again.
        """
        if self._rests > 0:
            self._rests -= 1
            return DraftTokenIds(proposed.req_ids, self._as_wished(proposed, requests))
        began, num_looks = time.perf_counter(), 0
        made = self._as_wished(proposed, requests)
        for place, name in enumerate(proposed.req_ids):
            request = requests.get(name)
            if made[place] and self._may_choose(request):
                assert request is not None
                self._catch_up(request)
                head = token_array(made[place])
                made[place] = self.drafts.draft_beside(name, head).tolist()
                num_looks += 1
        if num_looks:
            seconds = (time.perf_counter() - began) / num_looks
            self._look_seconds += LOOK_WEIGHT * (seconds - self._look_seconds)
            most_tokens = num_looks * (1 + self._max_tokens)  # of a step
            if not beside.pays(self._look_seconds, self._step_seconds / most_tokens):
                self._rests = REST_LOOKS
        return DraftTokenIds(proposed.req_ids, made)

    def _may_choose(self, request: Request | None) -> bool:
        """Whether which draft is verified changes nothing but the number of steps.

        With a seed, what is drawn depends on what was drafted: it stays the head's draft, which
        depends on the text alone.
        """
        if request is None or not self._is_decoding(request):
            return False
        params = request.sampling_params
        assert params is not None
        return params.seed is None or params.sampling_type == SamplingType.GREEDY

    def _as_wished(self, proposed: DraftTokenIds, requests: dict[str, Request]) -> list[list[int]]:
        """The head's drafts; none for a request that asked for none."""
        asked = [requests.get(name) for name in proposed.req_ids]
        return [
            [] if request is not None and wish_of(request) is False else list(tokens)
            for request, tokens in zip(asked, proposed.draft_token_ids, strict=True)
        ]

    def _drafts(self, running: list[Request]) -> dict[str, list[int]]:
        """For all that decode; each row is weighed against a step as they have been of late."""
        contexts = [request.num_tokens for request in running]
        rows = len(running) + self._drafted_a_step
        attended = sum(contexts) / max(1, len(running)) * rows
        made = len(running) + self._accepted_a_step
        return {
            request.request_id: self._draft(
                request, self.costs.least_chance(rows, attended, made, context)
            )
            for request, context in zip(running, contexts, strict=True)
        }

    def ended(self, request: Request) -> None:
        """A request is over: its session keeps its index, its agent its answer."""
        is_known = request.request_id in self.drafts
        if is_known or (self.is_beside_head and request.request_id in self._manager.turns):
            self._catch_up(request)
            now_s = time.monotonic()
            self.drafts.ends(request.request_id, now_s)
            self.drafts.forget_before(now_s - self._manager.idle_seconds)

    def closed(self, is_meant: Callable[[SessionKey], bool]) -> None:
        """Some sessions are over: their indexes are given up."""
        for session in self.drafts.waiting():
            if isinstance(session, SessionKey) and is_meant(session):
                self.drafts.forget(session)

    def _is_decoding(self, request: Request | None) -> bool:
        if request is None or request.is_finished() or request.is_prefill_chunk:
            return False
        return request.request_id in self._manager.turns

    def _catch_up(self, request: Request) -> None:
        """Learn what was generated since the last time."""
        name = request.request_id
        if name not in self.drafts:
            turn = self._manager.turns[name]
            self.drafts.begins(name, turn.session, agent_of(turn, self._rules), turn.token_ids)
        known = self.drafts.num_tokens(name) - request.num_prompt_tokens
        new = list(request.output_token_ids[known:])
        if new:
            self.drafts.came(name, token_array(new))

    def _draft(self, request: Request, least_chance: float) -> list[int]:
        wish = wish_of(request)
        if wish is not None:
            least_chance = LEAST_CHANCE if wish else 1.0
        left = request.max_tokens - request.num_output_tokens - 1
        most = min(self._max_tokens, left)
        tokens: list[int] = self.drafts.draft(request.request_id, least_chance, most).tolist()
        return tokens
