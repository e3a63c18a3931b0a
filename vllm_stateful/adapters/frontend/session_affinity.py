# SPDX-License-Identifier: Apache-2.0
"""API process: with data parallelism, sends a turn to the engine core with its conversation.

vLLM's client of several engine cores obeys ``EngineCoreRequest.data_parallel_rank`` if it is set. A
router in front of vLLM may set it with a header. Here it is set when the request is made. When the
request is sent, we see which engine core vLLM has chosen.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from vllm.logger import init_logger
from vllm.v1.engine import EngineCoreRequest

from vllm_stateful.adapters.frontend.sent_body import sent_body
from vllm_stateful.config import process_config
from vllm_stateful.observe.prompt_counts import PROMPT_COUNTS
from vllm_stateful.request import opening_of
from vllm_stateful.transport.session_affinity import Choice, SessionAffinity

logger = init_logger("vllm.stateful")


class EngineChooser:
    """Chooses among the engine cores of one client (``DPLBAsyncMPClient``)."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self._affinity = SessionAffinity(is_shared=client.client_count > 1)

    def choose(self, request: EngineCoreRequest, opening: str | None) -> None:
        """Set the rank of a request, or leave it to vLLM.

        Args:
            request: the request, with its session id and salt.
            opening: how the conversation begins. It stands for the session id where there is none.
        """
        if request.pooling_params is not None:
            return
        named = request.session_id or opening
        chosen = self._affinity.choose(
            request.request_id,
            request.prompt_token_ids,
            None if named is None else f"{request.cache_salt}\0{named}",
            self._loads(),
        )
        is_free = request.data_parallel_rank is None
        PROMPT_COUNTS.chose(chosen.why if is_free else Choice.CLIENT)
        if is_free and chosen.engine is not None:
            request.data_parallel_rank = self.client.core_engines.index(chosen.engine)

    def went(self, request: EngineCoreRequest, engine: Hashable) -> None:
        """Note the engine core that a request is sent to; the request has another id by then."""
        known = request.external_req_id or request.request_id
        self._affinity.went(known, request.prompt_token_ids, engine)

    def _loads(self) -> dict[Hashable, float]:
        """The load of each engine core, as vLLM's ``get_core_engine_for_request`` computes it."""
        client, loads = self.client, {}
        for engine, counts in zip(client.core_engines, client.lb_engines, strict=False):
            waiting, running, kv_cache_usage = counts
            load = max(client.client_count * client.engine_inflight[engine], waiting + running)
            loads[engine] = load + waiting * 6.0 * max(0.0, kv_cache_usage - 0.5)
        return loads


_chooser: EngineChooser | None = None


def watch(client: Any, sees_sent: bool) -> None:
    """Choose for the requests of this client from now on, if it has several engine cores.

    Args:
        client: the client of the engine cores.
        sees_sent: whether ``went`` is told of each request (the patches of ``transport``).
    """
    global _chooser
    _chooser = None
    if not hasattr(client, "lb_engines") or not hasattr(client, "engine_inflight"):
        return
    if "session-affinity" in process_config().disable:
        return
    if not sees_sent:
        logger.warning("stateful: no session affinity: it needs the transport of prompts")
        return
    _chooser = EngineChooser(client)
    logger.info("stateful: turns go to the engine core of their conversation")


def choose(request: EngineCoreRequest, opening: str | None) -> None:
    """Choose the engine core of a request, if there is a choice."""
    if _chooser is not None:
        _chooser.choose(request, opening)


def went(client: Any, request: EngineCoreRequest, engine: Hashable) -> None:
    """Note that a request is sent to an engine core."""
    if _chooser is not None and _chooser.client is client:
        _chooser.went(request, engine)


def opening(raw_request: Any | None) -> str | None:
    """How the conversation of an HTTP request begins; None if there is no choice of engine core."""
    if _chooser is None:
        return None
    body = sent_body(raw_request)
    return opening_of(body.get("messages", body.get("input")))
