# SPDX-License-Identifier: Apache-2.0
"""Makes drafts for vLLM's speculative decoding in the engine core, where the sessions are.

After each step vLLM asks its worker for drafts and hands them to the scheduler, which has the next
step verify them. Here the scheduler fills in the drafts. Beside a drafting head it keeps the head's
drafts, except where the session's draft is better (`speculate/beside_head.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams, SamplingType
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request

from vllm_stateful.adapters.engine.agents import agent_of, wish_of
from vllm_stateful.adapters.engine.kv_blocks import StatefulKVCacheManager
from vllm_stateful.adapters.speculation import is_beyond_verifying, uses_logits_processors
from vllm_stateful.prefix.boundaries import BoundaryRules
from vllm_stateful.speculate.beside_head import REST_LOOKS, BesideHead
from vllm_stateful.speculate.session_drafts import SessionDrafts, compile_now
from vllm_stateful.speculate.step_costs import LEAST_CHANCE, PRIOR_SECONDS, StepCosts
from vllm_stateful.types import SessionKey, token_array

MAX_BYTES = 512 << 20
"""The most bytes for the indexes of waiting sessions. The answers of agents get as many again."""

RATE_DECAY = 0.98
"""The weight of a step in the mean drafted and accepted tokens, relative to the step after it."""


LOOK_WEIGHT = 0.05
"""The weight of the newest step in the mean seconds of a look-up and of a step."""


class EngineDrafts:
    """The drafts of one scheduler's turns.

    Args:
        manager: the KV cache manager that holds the turns.
        rules: where messages begin in token ids; None when that is not known.
        max_tokens: the most tokens of one draft (``num_speculative_tokens``).
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
        """Whether drafts are verified only while all turns are greedy. On a CPU, vLLM 0.32 samples
        from garbage, or ends the engine, when a step verifies drafts and any of its turns is not
        greedy: ``rejection_sampler.expand_batch_to_tokens`` leaves temperatures, top_k and top_p
        unset there (vllm-project/vllm#42638). This happens with any drafts."""
        self._manager = manager
        self._rules = rules
        self._max_tokens = max_tokens
        self._drafted_a_step = self._accepted_a_step = 0.0
        self._started: tuple[float, int, int] | None = None
        self._look_seconds = 0.0
        """The recent mean seconds of one look-up beside a head."""
        self._step_seconds = PRIOR_SECONDS
        """The recent mean seconds of a step that only decodes."""
        self._rests = 0
        """The number of steps that still pass without a look-up."""

    def withdraw(self, requests: dict[str, Request]) -> None:
        """Remove all drafts before a step is scheduled, if a turn has come that they would hurt."""
        if self._is_verifying_unsafe(requests):
            for name, request in requests.items():
                if request.spec_token_ids:
                    request.spec_token_ids = []
                    self.drafts.withdraw(name)

    def _is_verifying_unsafe(self, requests: dict[str, Request]) -> bool:
        def is_unsafe(params: SamplingParams) -> bool:
            is_greedy = params.sampling_type == SamplingType.GREEDY
            return is_beyond_verifying(params) or (self.greedy_only and not is_greedy)

        running = (request.sampling_params for request in requests.values())
        return any(is_unsafe(params) for params in running if params is not None)

    def step_begins(self, output: SchedulerOutput) -> None:
        """Start to time a scheduled step, if it only decodes."""
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
        if not self.is_beside_head:  # beside a head the number of rows never differs
            computed = output.scheduled_cached_reqs
            attended = sum(
                num * output.num_scheduled_tokens[name]
                for name, num in zip(computed.req_ids, computed.num_computed_tokens, strict=True)
            )
        self._started = (time.perf_counter(), rows, attended)

    def step_ends(self) -> None:
        """Learn how long the step took; its output is here."""
        if self._started is not None:
            began, rows, attended = self._started
            seconds = time.perf_counter() - began
            if not self.is_beside_head:
                self.costs.saw(rows, attended, seconds)
            self._step_seconds += LOOK_WEIGHT * (seconds - self._step_seconds)
            self._started = None

    def fill(self, proposed: DraftTokenIds, requests: dict[str, Request]) -> DraftTokenIds:
        """The drafts of the requests that a step has run, instead of the worker's drafts."""
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

        While look-ups do not pay, only one step in ``REST_LOOKS + 1`` has one. At the next look-up,
        the draft that the last one found is compared with the tokens that came. So look-ups may pay
        again.
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
        """Whether the choice of the draft changes nothing but the number of steps.

        With a seed, what is sampled depends on what was drafted. So the head's draft stays: it
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
        """The drafts of all requests that decode, weighed against a step of recent size."""
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
        """Keep an ended request's index for its session, and its answer for its agent."""
        is_known = request.request_id in self.drafts
        if is_known or (self.is_beside_head and request.request_id in self._manager.turns):
            self._catch_up(request)
            now_s = time.monotonic()
            self.drafts.ends(request.request_id, now_s)
            self.drafts.forget_before(now_s - self._manager.idle_seconds)

    def closed(self, is_meant: Callable[[SessionKey], bool]) -> None:
        """Forget the indexes of closed sessions."""
        for session in self.drafts.waiting():
            if isinstance(session, SessionKey) and is_meant(session):
                self.drafts.forget(session)

    def _is_decoding(self, request: Request | None) -> bool:
        if request is None or request.is_finished() or request.is_prefill_chunk:
            return False
        return request.request_id in self._manager.turns

    def _catch_up(self, request: Request) -> None:
        """Learn the tokens that were generated since the last call."""
        name = request.request_id
        if name not in self.drafts:
            turn = self._manager.turns[name]
            self.drafts.begins(name, turn.session, agent_of(turn, self._rules), turn.token_ids)
        known = self.drafts.num_tokens(name) - request.num_prompt_tokens
        new = list(request.output_token_ids[known:])
        if new:
            self.drafts.came(name, token_array(new))

    def _draft(self, request: Request, least_chance: float) -> list[int]:
        if request.sampling_params is None or uses_logits_processors(request.sampling_params):
            return []
        wish = wish_of(request)
        if wish is not None:
            least_chance = LEAST_CHANCE if wish else 1.0
        left = request.max_tokens - request.num_output_tokens - 1
        most = min(self._max_tokens, left)
        tokens: list[int] = self.drafts.draft(request.request_id, least_chance, most).tolist()
        return tokens
