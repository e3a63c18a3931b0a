# SPDX-License-Identifier: Apache-2.0
"""vLLM's schedulers with resident sessions: one mixin over ``Scheduler`` and ``AsyncScheduler``.

The scheduling itself is vLLM's. The mixin gives the scheduler a stateful KV cache manager. When the
model or the engine's settings are not known to be safe, it leaves the scheduler as it is and says
why.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from vllm_stateful.adapters.attention_choice import is_cuda_backend_chosen
from vllm_stateful.adapters.engine.answer_ends import AnswerEnds, end_ids
from vllm_stateful.adapters.engine.called_tools import CalledTools
from vllm_stateful.adapters.engine.connectors import loads_of, tier_of, unsupported_connector
from vllm_stateful.adapters.engine.device_drafts import DeviceDrafts
from vllm_stateful.adapters.engine.hash_check import HashCheck
from vllm_stateful.adapters.engine.invariants import check_pool
from vllm_stateful.adapters.engine.kv_blocks import StatefulKVCacheManager
from vllm_stateful.adapters.engine.kv_groups import group_of, kinds_of
from vllm_stateful.adapters.engine.kv_origin import building
from vllm_stateful.adapters.engine.message_boundaries import boundary_rules
from vllm_stateful.adapters.engine.prefill_groups import SchedulerPrefills
from vllm_stateful.adapters.engine.resume_points import ResumePoints
from vllm_stateful.adapters.engine.running_states import is_only_step_in_flight
from vllm_stateful.adapters.engine.session_operations import SessionOperations
from vllm_stateful.adapters.engine.shared_prefixes import SchedulerPrefixes
from vllm_stateful.adapters.engine.turn import session_of, take_said
from vllm_stateful.adapters.engine.turn_records import TurnRecords, decoder
from vllm_stateful.adapters.engine.waiting_queue import ServiceQueue
from vllm_stateful.adapters.fit import is_fit
from vllm_stateful.adapters.slots import on_request
from vllm_stateful.adapters.speculation import (
    CUSTOM_PROCESSORS,
    has_custom_processors,
    has_head,
    is_asked_for,
    is_looked_up,
    why_no_drafts,
    why_not_beside_head,
)
from vllm_stateful.config import StatefulConfig, process_config
from vllm_stateful.errors import UnsupportedError
from vllm_stateful.prefix.boundaries import BoundaryRules
from vllm_stateful.types import SessionKey

if TYPE_CHECKING:
    from vllm_stateful.adapters.engine.engine_drafts import EngineDrafts
    from vllm_stateful.adapters.engine.offload_tier import OffloadTier

logger = init_logger("vllm.stateful")


def unsupported_reason(scheduler: Scheduler) -> str | None:
    """Why sessions cannot be kept in this engine; None when they can."""
    manager = scheduler.kv_cache_manager
    if not manager.enable_caching:
        return "prefix caching is off (--no-enable-prefix-caching)"
    managers = manager.coordinator.single_type_managers
    if not managers:
        return "the model has no KV cache"
    try:
        groups = [group_of(each) for each in managers]
    except UnsupportedError as error:
        return str(error)
    if any(each.block_pool is not manager.block_pool for each in managers):
        return "its KV cache groups have blocks of their own"
    return unsupported_connector(scheduler, groups) or _unsupported_setting(scheduler)


def _unsupported_setting(scheduler: Scheduler) -> str | None:
    size = scheduler.cache_config.block_size
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    if any(isinstance(each, MambaManager) and each.block_size != size for each in managers):
        return "chunks of a prompt do not end where blocks of states do"
    if scheduler.cache_config.use_replayssm:
        return "states are saved now and then only (--use-replayssm)"
    if scheduler.num_prefill_lookahead > 1:
        return "the draft head's KV depends on more than the next token (several MTP modules)"
    if scheduler.prefix_replay_tokens:
        return "a part of each hit is computed again (bounded replay)"
    if scheduler.aux_output_connector is not None:
        return "auxiliary outputs (routed experts) are kept per whole block"
    if scheduler.num_sampled_tokens_per_step != 1:
        return "the model does not sample one token a step"
    if scheduler.dcp_world_size != 1 or scheduler.pcp_world_size != 1:
        return "context parallelism is on"
    return None


class _StatefulMixin:
    """Adds sessions to a vLLM scheduler class."""

    kv_cache_manager: Any
    structured_output_manager: Any
    requests: dict[str, Request]
    policy: SchedulingPolicy
    config: StatefulConfig
    by_service: ServiceQueue | None = None
    """The waiting queue; None without ``--stateful-order least-served``."""
    prefills: SchedulerPrefills | None = None
    engine_drafts: EngineDrafts | None = None
    """Makes drafts from sessions in the engine core, where they are made there."""
    device_drafts: DeviceDrafts | None = None
    """What the device looks drafts up in, where it makes the drafts."""
    prefixes: SchedulerPrefixes | None = None
    """The blocks that requests share, where our kernels for CUDA attend."""
    vllm_config: Any
    connector: Any
    cache_config: Any
    tier: OffloadTier | None = None
    """vLLM's offload tier, where it is on and its order is ours."""
    ends: AnswerEnds | None = None
    """The tokens that states should be kept behind, where drafts may run past them."""
    hash_check: HashCheck | None = None
    """The check of block hashes, where invariants are checked and vLLM hashes blocks."""
    ending: deque[tuple[int, Request]]
    """Turns that ended with a step in flight, and the step after which they are kept."""
    hash_block_size: int
    num_spec_tokens: int
    use_eagle: bool
    num_prefill_lookahead: int
    sched_step_seq: int
    processed_step_seq: int
    _request_blocks_can_be_freed: Callable[[Request], bool]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with building(kwargs.get("vllm_config") or args[0]):
            super().__init__(*args, **kwargs)
        self.config = process_config()
        self.tier = tier_of(self.connector)
        self.ending: deque[tuple[int, Request]] = deque()
        self.stateful_off = unsupported_reason(self)
        if self.stateful_off is None:
            self._become_stateful()
        elif self.config.strict:
            raise UnsupportedError(f"--plugin stateful: {self.stateful_off}")
        else:
            logger.warning("stateful: off, serving as stock vLLM: %s", self.stateful_off)

    def _become_stateful(self) -> None:
        """Extend the manager in place: the same object and state, with our four methods."""
        manager = self.kv_cache_manager
        if type(manager).__name__ != "KVCacheManager":
            raise UnsupportedError(f"the KV cache manager is a {type(manager).__name__}")
        manager.__class__ = StatefulKVCacheManager
        tokenizer = getattr(self.structured_output_manager, "tokenizer", None)
        rules = boundary_rules(tokenizer)
        groups = [group_of(each) for each in manager.coordinator.single_type_managers]
        # A head computes a token's KV from the next token, too. A state one token earlier is not
        # kept, so with states one slot of the head may belong to another history. The next draft
        # may then be worse, but no answer changes.
        num_ahead = int(self.use_eagle or self.num_prefill_lookahead > 0)
        has_states = any(group.is_state for group in groups)
        is_step_known = is_only_step_in_flight(self.vllm_config)
        if has_states and is_step_known and self.num_spec_tokens:
            ends = end_ids(self.vllm_config.model_config, tokenizer)
            self.ends = AnswerEnds(ends if rules is None else ends | rules.marker_ids)
        manager.become_stateful(
            pin_fraction=self.config.pin_fraction,
            idle_seconds=self.config.idle_seconds,
            clock=time.monotonic,
            called_tool=CalledTools(tokenizer),
            rules=rules,
            groups=groups,
            max_points=self.config.resume_points,
            lookahead=0 if has_states else num_ahead,
            num_hashed_ahead=num_ahead,
            num_drafts=self.num_spec_tokens,
            is_step_known=is_step_known,
            loads=loads_of(self.connector, self.cache_config.block_size),
        )
        logger.info(
            "stateful: on, sessions may pin %d of %d blocks of %d tokens; KV cache groups: %s",
            manager.store.pins.budget_blocks,
            manager.block_pool.num_gpu_blocks - 1,
            manager.store.block_size,
            kinds_of(manager.groups),
        )
        manager.store.tier = self.tier
        if self.config.explain != "off":
            decode = decoder(tokenizer, self.config.explain)
            manager.records = TurnRecords(manager.store, decode, is_traced=self._is_traced())
            manager.store.on_demoted = manager.records.demoted
        if self.config.check_invariants and manager.enable_caching:
            algorithm = self.vllm_config.cache_config.prefix_caching_hash_algo
            num_ahead = getattr(self, "num_hash_lookahead_tokens", 0)
            self.hash_check = HashCheck(self.hash_block_size, algorithm, num_ahead)
        if not manager.store.has_points:
            self.prefills = SchedulerPrefills(self)
        self._draft_from_sessions(rules)
        if self._are_prefixes_shared():
            self.prefixes = SchedulerPrefixes(manager)
        if self.config.order == "least-served":
            self._order_by_service()

    def _draft_from_sessions(self, rules: BoundaryRules | None) -> None:
        """Draft from sessions where vLLM was told to, and beside a drafting head."""
        is_beside_head, model = False, self.vllm_config.model_config
        if has_head(self.vllm_config) and self.num_spec_tokens:
            reason = why_not_beside_head(self.vllm_config, self.config)
            is_beside_head = reason is None
            logger.info("stateful: drafts from sessions beside the head: %s", reason or "on")
        elif self.vllm_config.speculative_config is None:
            logger.info("stateful: no drafts: %s", why_no_drafts(self.config))
        on_device = self.vllm_config.use_v2_model_runner
        if is_looked_up(self.vllm_config) or (is_beside_head and on_device):
            self.device_drafts = DeviceDrafts(
                self.kv_cache_manager, rules, is_beside_head=is_beside_head
            )
        elif is_asked_for(self.vllm_config) and has_custom_processors(model):
            logger.warning("stateful: no drafts from sessions: %s", CUSTOM_PROCESSORS)
        elif is_asked_for(self.vllm_config) or is_beside_head:
            from vllm_stateful.adapters.engine.engine_drafts import (
                EngineDrafts,  # numba: a second
            )

            self.engine_drafts = EngineDrafts(
                self.kv_cache_manager,
                rules,
                self.num_spec_tokens,
                is_beside_head=is_beside_head,
            )

    def _is_traced(self) -> bool:
        """Whether vLLM sends traces, so that turns get spans."""
        settings = getattr(self.vllm_config, "observability_config", None)
        endpoint = getattr(settings, "otlp_traces_endpoint", None)
        return endpoint is not None and is_fit("tracing", "engine")

    def _are_prefixes_shared(self) -> bool:
        """Whether the worker can attend from several requests to one prefix."""
        if len(self.kv_cache_manager.groups) > 1:
            return False
        is_wanted = "shared-prefixes" not in self.config.disable
        return is_wanted and self.vllm_config.use_v2_model_runner and is_cuda_backend_chosen()

    # ---- the order of waiting turns, when asked for --------------------------------------

    def _order_by_service(self) -> None:
        """Put our queue in the place of vLLM's, unless priorities were asked for.

        Raises:
            UnsupportedError: vLLM orders by priority, in strict mode.
        """
        if self.policy is SchedulingPolicy.FCFS:
            self.waiting = self.by_service = ServiceQueue()
            return
        problem = f"--scheduling-policy {self.policy.value} decides, not --stateful-order"
        if self.config.strict:
            raise UnsupportedError(f"--plugin stateful: {problem}")
        logger.warning("stateful: %s", problem)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """End a request, as vLLM does for every request; count what it generated."""
        if self.tier is not None:
            self.tier.request_ended(request.request_id, self._session_of(request))
        if self.by_service is not None:
            self.by_service.ended(request)
        if self.prefills is not None:
            self.prefills.ended(request)
        if self.engine_drafts is not None:
            self.engine_drafts.ended(request)
        if self.device_drafts is not None:
            self.device_drafts.ended(request)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Whether a waiting request can run in this step; not while another computes its prefix."""
        ready = super()._handle_blocked_waiting_request(request)  # type: ignore[misc]
        return bool(ready) and not (self.prefills is not None and self.prefills.waits(request))

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """End a chunk where vLLM must cache states, or where a resume point is wanted."""
        num_new: int = super()._mamba_block_aligned_split(  # type: ignore[misc]
            request, num_new_tokens, num_new_local_computed_tokens, num_external_computed_tokens
        )
        turn = None if self.stateful_off else self.kv_cache_manager.turns.get(request.request_id)
        if turn is None or not turn.wanted:
            return num_new
        start = request.num_computed_tokens + num_new_local_computed_tokens
        return ResumePoints.stop(turn, start + num_external_computed_tokens, num_new)

    # ---- beside an offload tier ----------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Add a request, as vLLM does; decide whether it is offloaded."""
        take_said(request)
        if self.tier is not None and request.request_id not in self.requests:
            self.tier.admit(request, session_of(request))
        super().add_request(request)  # type: ignore[misc]

    def _session_of(self, request: Request) -> SessionKey:
        turn = None if self.stateful_off else self.kv_cache_manager.turns.get(request.request_id)
        return session_of(request) if turn is None else turn.session

    def _free_request_blocks(self, request: Request) -> None:
        """Free a request's blocks once no step in flight can write them, as vLLM does.

        An ended turn is kept only then. Until then it cannot be resumed, and no load can be given
        its blocks.
        """
        if self.stateful_off is not None or self._request_blocks_can_be_freed(request):
            super()._free_request_blocks(request)  # type: ignore[misc]
        elif request.is_finished():
            self.ending.append((self.sched_step_seq, request))
        else:
            self.kv_cache_manager.preempted(request)
            super()._free_request_blocks(request)  # type: ignore[misc]

    def _drain_deferred_frees(self) -> None:
        super()._drain_deferred_frees()  # type: ignore[misc]
        while self.ending and self.ending[0][0] <= self.processed_step_seq:
            self.kv_cache_manager.free(self.ending.popleft()[1])

    # ---- one step ------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule one step, as vLLM does; count what the admitted turns will compute."""
        output = self._schedule(*args, **kwargs)
        if self.by_service is not None:
            for new in output.scheduled_new_reqs:
                self.by_service.admitted(self.requests[new.req_id], new.num_computed_tokens)
        if self.engine_drafts is not None:
            self.engine_drafts.step_begins(output)
        if self.device_drafts is not None:
            self.device_drafts.step_begins(output)
        if self.prefixes is not None:
            self.prefixes.step_begins(output, self.requests)
        if self.ends is not None:
            self.ends.step_begins(output)
            self._count_steps(output, +1)
        self._check()
        return output

    def _schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule vLLM's own step, without placeholders where the engine core makes the drafts.

        To fill a full CUDA graph, vLLM adds up to 16 placeholder drafts to a turn with one token
        left to compute, and rejects them all. Drafts from the engine core run without such graphs.
        """
        if self.device_drafts is not None:
            self.device_drafts.withdraw(self.requests)
        if self.engine_drafts is None or self.engine_drafts.is_beside_head:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        self.engine_drafts.withdraw(self.requests)
        num, self.num_spec_tokens = self.num_spec_tokens, 0
        try:
            output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.num_spec_tokens = num
        output.num_spec_tokens_to_schedule = num
        return output

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take over the worker's drafts, as vLLM does, or the sessions' drafts in their place."""
        if self.engine_drafts is not None:
            draft_token_ids = self.engine_drafts.fill(draft_token_ids, self.requests)
        super().update_draft_token_ids(draft_token_ids)  # type: ignore[misc]

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """Do vLLM's bookkeeping after a step; turns that ended are kept here."""
        if self.engine_drafts is not None:
            self.engine_drafts.step_ends()
        if self.ends is not None:
            self._count_steps(scheduler_output, -1)
        if self.stateful_off is None:
            self.kv_cache_manager.read_loads(model_runner_output.kv_connector_output)
        outputs = super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )
        self._check()
        return outputs

    def _count_steps(self, output: SchedulerOutput, change: int) -> None:
        for name in output.num_scheduled_tokens:
            request = self.requests.get(name)
            if request is not None and not request.is_finished():
                on_request(request).num_steps += change

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> Any:
        """Read what a step sampled, as vLLM does; note how many tokens that were."""
        num_sampled = len(new_token_ids)
        is_news = num_sampled > 1 or (num_sampled and request.num_output_tokens == 0)
        result = super()._update_request_with_output(  # type: ignore[misc]
            request, new_token_ids, is_stale
        )
        if is_news and not is_stale and self.stateful_off is None:
            self.kv_cache_manager.sampled(request.request_id, len(result[0]))
        if self.num_spec_tokens and not is_stale:
            seen = on_request(request)
            seen.num_sampled, seen.is_cut = num_sampled, len(result[0]) < num_sampled
        return result

    def _check(self) -> None:
        if self.config.check_invariants and self.stateful_off is None:
            check_pool(self)
            if self.hash_check is not None:
                self.hash_check.check(self.kv_cache_manager, self.requests)

    def stateful(self, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Answer a utility call of the API server (`session_operations`).

        Raises:
            ValueError: no such operation.
        """
        return SessionOperations(self).answer(operation, arguments)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> Any:
        """Count a request's verified drafts, as vLLM does."""
        if self.stateful_off is None:
            num_invalid = (num_invalid_spec_tokens or {}).get(request_id, 0)
            self.kv_cache_manager.verified(request_id, num_draft_tokens - num_invalid)
        if self.device_drafts is not None:
            self.device_drafts.verified(num_draft_tokens, num_accepted_tokens)
        return super().make_spec_decoding_stats(  # type: ignore[misc]
            spec_decoding_stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )


class StatefulScheduler(_StatefulMixin, Scheduler):  # type: ignore[misc]
    """``Scheduler`` with resident sessions (CPU, pipeline settings without async scheduling)."""


class StatefulAsyncScheduler(_StatefulMixin, AsyncScheduler):  # type: ignore[misc]
    """``AsyncScheduler`` with resident sessions (CUDA's default)."""


def answer_utility(scheduler: Any, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Answer a utility call to the engine core, for any class of scheduler."""
    if not isinstance(scheduler, _StatefulMixin):
        return {"off": f"the scheduler is {type(scheduler).__name__}"}
    return scheduler.stateful(operation, arguments)


def stateful_scheduler_class(stock: type) -> type | None:
    """The stateful counterpart of a stock scheduler class; None for any other class."""
    counterparts: dict[type, type] = {
        Scheduler: StatefulScheduler,
        AsyncScheduler: StatefulAsyncScheduler,
    }
    return counterparts.get(stock)
