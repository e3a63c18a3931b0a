# SPDX-License-Identifier: Apache-2.0
"""API process: answers from memory, between vLLM's output processor and its engine core.

The outputs of the engine are kept, step by step. A request that is answered from memory never
reaches the engine. Its steps go into the client's own queue of outputs. So vLLM's detokenizer, stop
strings, parsers, streams and ``usage`` make its answer as they make any other.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Coroutine
from typing import Any

import msgspec
import numpy as np
from vllm.logger import init_logger
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.metrics.stats import PrefillStats

from vllm_stateful.adapters.frontend.response_epoch import Epochs
from vllm_stateful.adapters.frontend.response_key import Uncached, key_of
from vllm_stateful.adapters.frontend.turn_context import current
from vllm_stateful.answer.response_cache import Answer, Flight, Flights, ResponseCache
from vllm_stateful.config import process_config
from vllm_stateful.observe.response_counts import RESPONSE_COUNTS, Response
from vllm_stateful.transport.wire import BASE_MISS

logger = init_logger("vllm.stateful")

STEP_BYTES = 400
"""The size of an ``EngineCoreOutput`` without what it points to."""

ROUNDS_TO_STREAM = 6
"""Rounds of the event loop from vLLM's queue of outputs to the stream of an answer: three, and some
for middleware. If a step comes sooner, vLLM adds it to the step before. A parser of tool calls
would then see other pieces than the first time."""

TOKEN_BYTES = 40
"""The size of a token id in a list."""

WHOLE = (FinishReason.STOP, FinishReason.LENGTH)

HARMLESS = frozenset(
    {
        "execute_dummy_batch",
        "get_supported_tasks",
        "get_weight_version",
        "is_scheduler_paused",
        "is_sleeping",
        "list_loras",
        "profile",
        "resume_scheduler",
        "stateful",
    }
)
"""Calls to the engine that change no answer. After any other call, all answers are forgotten."""

_all: weakref.WeakSet[Responses] = weakref.WeakSet()


class Responses:
    """The answers that one client of the engine core (``AsyncMPClient``) has got."""

    def __init__(self, client: Any, max_bytes: int) -> None:
        self._client = client
        self._outputs: asyncio.Queue[Any] = client.outputs_queue
        self._epochs = Epochs(client)
        self._asking: set[asyncio.Task[None]] = set()
        self._cache: ResponseCache[EngineCoreOutput] = ResponseCache(max_bytes)
        self._flights: Flights[EngineCoreOutput] = Flights()
        self._num_prompt: dict[str, int] = {}
        """The number of prompt tokens of each request that follows another one."""
        self._replays: dict[str, asyncio.Task[None]] = {}
        _all.add(self)
        RESPONSE_COUNTS.watch_memory(lambda: self._cache.num_bytes)

    def is_answered(self, request: EngineCoreRequest) -> bool:
        """Whether a request is answered from here; else it goes to the engine."""
        if self._flights.led_by(request.request_id) is not None:
            return False  # sent again, because the engine had lost the prompt's base
        turn = current()
        key = key_of(request, turn)
        if isinstance(key, Uncached):
            RESPONSE_COUNTS.uncached(str(key))
            return False
        assert turn.cache_control is not None
        name = request.request_id
        if turn.cache_control.is_looked_up and self._is_known(key, request):
            return True
        self._begin(key, name)
        RESPONSE_COUNTS.responded(Response.MISS)
        return False

    def _is_known(self, key: bytes, request: EngineCoreRequest) -> bool:
        name, num_prompt = request.request_id, len(request.prompt_token_ids or ())
        answer = self._cache.get(key)
        if answer is not None:
            replay = self._replay_if_it_holds if self._epochs.is_shared else self._replay
            task = asyncio.get_running_loop().create_task(replay(request, answer, num_prompt))
            self._replays[name] = task
            task.add_done_callback(lambda _: self._replays.pop(name, None))
            return True
        if self._epochs.is_shared:
            return False  # the other request may have begun before another server's call
        flight = self._flights.join(key, name)
        if flight is None:
            return False
        self._num_prompt[name] = num_prompt
        RESPONSE_COUNTS.responded(Response.JOINED)
        return True

    def _begin(self, key: bytes, name: str) -> None:
        """Note that a request goes to the engine."""
        flight = self._flights.begin(key, name)
        flight.epoch = self._epochs.last
        if self._epochs.is_shared and flight.epoch is None:
            self._later(self._hear())

    def _later(self, what: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(what)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _hear(self) -> None:
        """Ask the engine for its epoch, and forget all answers that were made in another."""
        try:
            epoch = await self._epochs.ask()
        except Exception as error:  # any error of the engine
            logger.warning("stateful: answers are not remembered: the engine says %r", error)
            self.forget()
            return
        if epoch != self._epochs.last:
            self.forget()
            self._epochs.last = epoch

    async def _replay_if_it_holds(
        self, request: EngineCoreRequest, answer: Answer[EngineCoreOutput], num_prompt: int
    ) -> None:
        """Replay an answer that still holds; otherwise ask the engine, as for an unknown answer."""
        await self._hear()
        if self._cache.get(answer.key) is answer:
            await self._replay(request, answer, num_prompt)
            return
        self._replays.pop(request.request_id, None)
        try:
            await self._client.add_request_async(request)
        except Exception:  # the engine has gone, which ends every request
            logger.exception("stateful: a request could not be sent to the engine")

    async def _replay(
        self, request: EngineCoreRequest, answer: Answer[EngineCoreOutput], num_prompt: int
    ) -> None:
        """Replay an answer in the steps in which it came, so that a stream stays a stream."""
        RESPONSE_COUNTS.responded(Response.HIT)
        for number, step in enumerate(answer.steps):
            output = _for(request.request_id, step)
            output = output if number else _first(output, num_prompt)
            self._outputs.put_nowait(EngineCoreOutputs(outputs=[output]))
            for _ in range(ROUNDS_TO_STREAM):
                await asyncio.sleep(0)

    def came(self, output: EngineCoreOutput) -> list[EngineCoreOutput]:
        """Note one output of the engine; returns copies for the requests that follow its own."""
        if output.stop_reason == BASE_MISS:
            return []
        step = msgspec.structs.replace(
            _for(output.request_id, output),
            events=None,
            trace_headers=None,
            prefill_stats=None,
            spec_decode_metrics=None,
        )
        flight = self._flights.came(output.request_id, step, _num_bytes(step))
        if flight is None:
            return []
        copies = []
        for follower, number, given in flight.give():
            copy = _for(follower, given)
            if number == 0:
                events = output.events if len(flight.steps) == 1 else None
                copy = _first(copy, self._num_prompt[follower], events)
            copies.append(copy)
        if output.kv_transfer_params is not None or output.ec_transfer_params is not None:
            flight.is_kept = False
        if output.finish_reason is not None:
            self._ends(flight, is_whole=output.finish_reason in WHOLE)
        return copies

    def stopped(self, request_id: str) -> None:
        """Note that a stop string ended an answer: what has come of it is the whole answer."""
        flight = self._flights.of(request_id)
        if flight is not None and flight.is_kept:
            self._keep(flight, Answer(flight.key, tuple(flight.steps), flight.num_bytes))
            flight.is_kept = False

    def aborted(self, request_ids: list[str]) -> list[str]:
        """Note aborted requests; returns those requests, or others, that the engine may now end."""
        left = []
        for name in request_ids:
            replay = self._replays.pop(name, None)
            if replay is not None:
                replay.cancel()
            elif self._flights.of(name) is None:
                left.append(name)
            else:
                self._num_prompt.pop(name, None)
                leader = self._flights.leaves(name)
                left += [] if leader is None else [leader]
        return left

    @property
    def is_flying(self) -> bool:
        """Whether any request that may be remembered is at the engine."""
        return len(self._flights) > 0

    def forget(self) -> None:
        """Forget all answers, because the model may answer differently from now on."""
        self._cache.clear()
        self._flights.forget()
        self._epochs.last = None

    async def changed(self, engine: Any) -> None:
        """Note that a call has ended after which the engine may answer differently."""
        self.forget()  # what was answered during the call
        if not self._epochs.is_shared:
            return
        try:
            await self._epochs.begin(engine)
        except Exception as error:  # it has ended or has no plugin, and nobody remembers anything
            logger.warning("stateful: the engine does not count what it was told: %r", error)

    def _ends(self, flight: Flight[EngineCoreOutput], *, is_whole: bool) -> None:
        for follower in flight.followers:
            self._num_prompt.pop(follower, None)
        answer = self._flights.ends(flight)
        if is_whole and flight.is_kept:
            self._keep(flight, answer)

    def _keep(self, flight: Flight[EngineCoreOutput], answer: Answer[EngineCoreOutput]) -> None:
        if not self._epochs.is_shared:
            self._store(answer)
        elif flight.epoch is not None:
            self._later(self._keep_if_it_holds(flight.epoch, answer))

    async def _keep_if_it_holds(self, epoch: int, answer: Answer[EngineCoreOutput]) -> None:
        """Keep an answer, unless another server made a call between the request and its end."""
        await self._hear()
        if self._epochs.last == epoch:
            self._store(answer)

    def _store(self, answer: Answer[EngineCoreOutput]) -> None:
        if self._cache.put(answer):
            RESPONSE_COUNTS.responded(Response.STORED)


def _for(request_id: str, step: EngineCoreOutput) -> EngineCoreOutput:
    """A copy of a step for a request, with a list of tokens of its own.

    vLLM puts the list into the answer. It adds the next steps' tokens to the list where a reader is
    slow (``vllm/outputs.py``, ``RequestOutput.add``), and cuts it at a stop string.
    """
    return msgspec.structs.replace(
        step, request_id=request_id, new_token_ids=list(step.new_token_ids)
    )


def _first(
    step: EngineCoreOutput, num_prompt: int, events: list[EngineCoreEvent] | None = None
) -> EngineCoreOutput:
    """A first step with what vLLM's statistics expect there: no prompt token was computed."""
    if not events:
        now = time.monotonic()
        kinds = (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED)
        events = [EngineCoreEvent.new_event(kind, now) for kind in kinds]
    stats = PrefillStats()
    stats.set(num_prompt, num_prompt, 0)
    return msgspec.structs.replace(step, events=events, prefill_stats=stats)


def _num_bytes(step: EngineCoreOutput) -> int:
    """The memory of a step in bytes: its token ids, and the arrays that it points to."""
    size = STEP_BYTES + TOKEN_BYTES * len(step.new_token_ids)
    waiting: list[Any] = [step.new_logprobs, step.new_sampling_mask, step.routed_experts]
    while waiting:
        value = waiting.pop()
        if isinstance(value, np.ndarray):
            size += value.nbytes
        elif isinstance(value, list | tuple):
            size += 8 * len(value)
            waiting += value
    return size


def responses_of(client: Any) -> Responses:
    """The answers kept for one client of the engine core."""
    made: Responses | None = getattr(client, "stateful_responses", None)
    if made is None:
        made = client.stateful_responses = Responses(client, process_config().response_cache_bytes)
    return made


def is_answered(client: Any, request: EngineCoreRequest) -> bool:
    """Hook of ``response-request``: see `Responses.is_answered`."""
    return responses_of(client).is_answered(request)


def left_to_abort(client: Any, request_ids: list[str]) -> list[str]:
    """Hook of ``response-abort``: see `Responses.aborted`."""
    return responses_of(client).aborted(request_ids)


def with_followers(outputs: list[EngineCoreOutput]) -> list[EngineCoreOutput]:
    """Hook of ``response-outputs``: the engine's outputs, and copies for requests that follow."""
    clients = [responses for responses in _all if responses.is_flying]
    copies = [copy for each in clients for output in outputs for copy in each.came(output)]
    return [*outputs, *copies] if copies else outputs


def stopped(request_ids: list[str]) -> None:
    """Second hook of ``response-outputs``: note the requests that stop strings ended."""
    for responses in _all:
        for request_id in request_ids:
            responses.stopped(request_id)


def called(client: Any, method: str) -> None:
    """Hook of ``response-forget``: forget all answers if a call to the engine may change them."""
    if method not in HARMLESS:
        responses_of(client).forget()


async def done(client: Any, method: str, engine: Any) -> None:
    """Second hook of ``response-forget``: the call has ended."""
    if method not in HARMLESS:
        await responses_of(client).changed(engine)
