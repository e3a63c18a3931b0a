# SPDX-License-Identifier: Apache-2.0
"""API process: sends the engine core only what a prompt adds to one that the engine holds."""

from __future__ import annotations

import asyncio
import copy
import os
import time
import uuid
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from vllm.logger import init_logger
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType
from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope

from vllm_stateful.adapters.frontend.session_affinity import went
from vllm_stateful.config import process_config
from vllm_stateful.observe.prompt_counts import PROMPT_COUNTS, Sent
from vllm_stateful.transport.header import ACTION, checksum
from vllm_stateful.transport.prompt_ids import PromptTokenIds
from vllm_stateful.transport.sent_versions import Parcel, SentVersions
from vllm_stateful.transport.wire import BASE_MISS, HINTS_PROTOCOL

logger = init_logger("vllm.stateful")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""The pause after the first failed question whether an engine takes deltas, and after many."""


class _Readiness:
    """What is known of one engine core: whether it takes deltas, and when to ask it."""

    def __init__(self) -> None:
        self.is_ready = False
        self.ask_at = 0.0
        """The time of the next question, by ``time.monotonic``. It is infinite while a question is
        on its way, and after an answer."""
        self.pause_s = FIRST_PAUSE_S


class Waiting(NamedTuple):
    """A request that was sent as a delta and has not been answered yet."""

    request: EngineCoreRequest
    engine: Hashable


class PromptSender:
    """Sends the prompts of one client of the engine core (``AsyncMPClient``)."""

    def __init__(self) -> None:
        self._versions = SentVersions(f"{os.getpid()}-{uuid.uuid4().hex[:16]}")
        self._waiting: dict[str, Waiting] = {}
        self._again: set[str] = set()
        """The ids of requests that are about to be sent a second time."""
        self._engines: dict[Hashable, _Readiness] = {}
        self._asking: set[asyncio.Task[None]] = set()
        self._has_checksums = process_config().check_invariants

    def may_send_deltas(self, client: Any, engine: Any) -> bool:
        """Whether an engine core said that it takes deltas; asks it the first time.

        The engine core may run on another machine, without this plugin. It would then take a delta
        for the whole prompt. A question that failed is repeated with a later prompt.
        """
        known = self._engines.get(engine)
        if known is None:
            known = self._engines[engine] = _Readiness()
        if not known.is_ready and time.monotonic() >= known.ask_at:
            known.ask_at = float("inf")
            task = asyncio.get_running_loop().create_task(self._ask(client, engine, known))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        return known.is_ready

    async def _ask(self, client: Any, engine: Any, known: _Readiness) -> None:
        try:
            answer = await client._call_utility_async("stateful", "transport", {}, engine=engine)
        except Exception as error:  # any error of the engine or the connection
            PROMPT_COUNTS.question_failed()
            if known.pause_s == FIRST_PAUSE_S:
                logger.warning("stateful: prompts go to the engine in full: it says %r", error)
            known.ask_at = time.monotonic() + known.pause_s
            known.pause_s = min(2 * known.pause_s, LONGEST_PAUSE_S)
            return
        known.is_ready = bool(answer.get("ready"))
        if known.pause_s > FIRST_PAUSE_S:
            logger.info("stateful: the engine answers again: deltas %s", known.is_ready)

    def pack(self, request: EngineCoreRequest, engine: Hashable) -> EngineCoreRequest:
        """The request to send in place of this one, which is not changed."""
        ids = request.prompt_token_ids
        if not isinstance(ids, PromptTokenIds) or ids.version == 0 or not _is_plain(request):
            return request
        parcel = self._versions.pack(engine, ids)
        if request.request_id in self._again:
            self._again.discard(request.request_id)
        else:
            PROMPT_COUNTS.sent(Sent.DELTA if parcel.is_delta else Sent.FULL)
        if parcel.is_delta:
            self._waiting[request.request_id] = Waiting(request, engine)
        if self._has_checksums:
            whole = checksum(np.array(ids, np.int32))
            parcel = parcel._replace(header=parcel.header._replace(checksum=whole))
        return _labelled(request, parcel)

    def take_misses(
        self, outputs: EngineCoreOutputs, dropped: Callable[[str], None] = lambda name: None
    ) -> list[EngineCoreRequest]:
        """Take the misses out of an engine's answer.

        Args:
            outputs: the answer. It is changed.
            dropped: is called with the id of each request that was aborted meanwhile. Such a
                request is not sent again, so the engine never says that it has finished.

        Returns:
            The requests to send again; they will be sent in full.
        """
        again = []
        has_misses = False
        for output in outputs.outputs:
            waiting = self._waiting.pop(output.request_id, None) if self._waiting else None
            if output.stop_reason != BASE_MISS:
                continue
            has_misses = True
            if waiting is None:
                dropped(output.request_id)
            else:
                self._versions.forget(waiting.engine, waiting.request.prompt_token_ids)
                PROMPT_COUNTS.sent(Sent.RESENT)
                self._again.add(output.request_id)
                again.append(waiting.request)
        if has_misses:
            outputs.outputs[:] = [o for o in outputs.outputs if o.stop_reason != BASE_MISS]
        return again

    def aborted(self, request_ids: Iterable[str]) -> None:
        """Note that aborted requests are not to be sent again."""
        for request_id in request_ids:
            self._waiting.pop(request_id, None)


def _is_plain(request: EngineCoreRequest) -> bool:
    """Whether the prompt is only token ids, and its hints are ours."""
    hints = request.kv_hints
    return (
        not request.resumable
        and not request.mm_features
        and request.prompt_embeds is None
        and request.prompt_is_token_ids is None
        and (hints is None or hints.protocol_version == HINTS_PROTOCOL)
    )


def _labelled(request: EngineCoreRequest, parcel: Parcel) -> EngineCoreRequest:
    label = KvHintAction("prompt", ACTION, "1", parcel.header.to_payload())
    others = [] if request.kv_hints is None else request.kv_hints.actions
    made = copy.copy(request)
    made.prompt_token_ids = parcel.token_ids
    made.kv_hints = KvHintsEnvelope(HINTS_PROTOCOL, request.request_id, [*others, label])
    return made


def sender_of(client: Any) -> PromptSender:
    """The sender of one client of the engine core."""
    sender: PromptSender | None = getattr(client, "stateful_sender", None)
    if sender is None:
        sender = client.stateful_sender = PromptSender()
    return sender


def take_misses(client: Any, outputs: Any) -> list[EngineCoreRequest]:
    """Hook of ``prompt-answers``: see `PromptSender.take_misses`."""
    return sender_of(client).take_misses(outputs, partial(_lands, client))


def _lands(client: Any, request_id: str) -> None:
    """Take a request out of the account of a client that has several engine cores."""
    in_flight = getattr(client, "reqs_in_flight", None)
    engine = None if in_flight is None else in_flight.pop(request_id, None)
    if engine is not None:
        client.engine_inflight[engine] -= 1


def pack(client: Any, request_type: EngineCoreRequestType, message: Any, engine: Any) -> Any:
    """Hook of ``prompt-send``: the message to encode in place of this one.

    Args:
        client: an ``AsyncMPClient``.
        request_type: the type of the message.
        message: a request, a list of request ids to abort, or anything else.
        engine: the identity of the engine core; None for the only one.
    """
    if request_type == EngineCoreRequestType.ADD:
        sender, to = sender_of(client), client.core_engine if engine is None else engine
        went(client, message, to)
        return sender.pack(message, to) if sender.may_send_deltas(client, to) else message
    if request_type == EngineCoreRequestType.ABORT:
        sender_of(client).aborted(message)
    return message


def ask_for_deltas(client: Any) -> None:
    """Ask every engine core of a client whether it takes deltas, before the first request."""
    for engine in getattr(client, "core_engines", ()):
        sender_of(client).may_send_deltas(client, engine)
