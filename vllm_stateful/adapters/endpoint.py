# SPDX-License-Identifier: Apache-2.0
"""HTTP: ``DELETE /v1/sessions/{id}``, and the metrics poll (``vllm.endpoint_plugins``).

There is no listing route: sessions cannot be enumerated, and a client reaches its own tenant's
sessions only.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from starlette.datastructures import State
from vllm.logger import init_logger

from vllm_stateful.adapters import session_affinity
from vllm_stateful.adapters.identity import TenantMiddleware, salt_of
from vllm_stateful.adapters.metrics_exporter import MetricsExporter
from vllm_stateful.adapters.prompt_sender import ask_for_deltas
from vllm_stateful.adapters.request_validation import validate_plain_messages
from vllm_stateful.compat.v0_32 import prompt_send
from vllm_stateful.config import is_enabled, load_config
from vllm_stateful.observe.prompt_counts import PROMPT_COUNTS
from vllm_stateful.observe.response_counts import RESPONSE_COUNTS
from vllm_stateful.observe.tool_call_counts import TOOL_CALL_COUNTS

logger = init_logger("vllm.stateful")

POLL_SECONDS = 1.0

router = APIRouter()


@router.delete("/v1/sessions/{session_id:path}")
async def close_session(
    session_id: str, raw_request: Request, cache_salt: str | None = None
) -> dict[str, Any]:
    """Release what a session keeps; its next turn starts cold. 404 when nothing is kept."""
    salt = salt_of(raw_request.headers, cache_salt)
    arguments = {"session_id": session_id, "cache_salt": salt}
    client = raw_request.app.state.engine_client
    results = await _ask_all(client, "close", arguments)
    closed = sum(result.get("closed", 0) for result in results)
    if closed == 0:
        raise HTTPException(404, f"no resident session {session_id!r}")
    return {"session_id": session_id, "closed": closed}


async def _ask_all(engine_client: Any, operation: str, arguments: dict[str, Any]) -> list[Any]:
    """One answer per engine core; several with data parallelism."""
    core = engine_client.engine_core
    return list(await core.call_utility_all_async("stateful", operation, arguments))


class StatefulEndpoint:
    """vLLM's ``EndpointPlugin``: routes, and a task that keeps ``/metrics`` current."""

    name = "stateful"
    required_tasks: tuple[str, ...] | None = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes, and what stands before vLLM's; nothing when not enabled."""
        if is_enabled():
            app.include_router(router)
            app.add_middleware(TenantMiddleware)
            if "messages" not in load_config().disable:
                validate_plain_messages(app)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Start the metrics' poll. Only the first of several API servers asks the engine."""
        if not is_enabled() or engine_client is None:
            return
        asks = getattr(engine_client.engine_core, "client_index", 0) == 0
        ask_for_deltas(engine_client.engine_core)
        session_affinity.watch(engine_client.engine_core, prompt_send.PATCH.is_applied)
        state.stateful_poll = asyncio.create_task(_poll(engine_client, MetricsExporter(), asks))


async def _poll(engine_client: Any, exporter: MetricsExporter, asks_engine: bool) -> None:
    failed = False
    while not engine_client.errored:
        exporter.update_own(
            PROMPT_COUNTS.snapshot() | RESPONSE_COUNTS.snapshot() | TOOL_CALL_COUNTS.snapshot()
        )
        try:
            if asks_engine:
                exporter.update(await _ask_all(engine_client, "stats", {}))
            failed = False
        except Exception as error:
            if not failed:
                logger.warning("stateful: no metrics from the engine: %r", error)
            failed = True
        await asyncio.sleep(POLL_SECONDS)


def make_endpoint_plugin() -> StatefulEndpoint:
    """Entry point of ``vllm.endpoint_plugins``."""
    return StatefulEndpoint()
