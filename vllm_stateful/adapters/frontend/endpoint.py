# SPDX-License-Identifier: Apache-2.0
"""Adds routes and a metrics poll to vLLM's server (``vllm.endpoint_plugins``)."""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.logger import init_logger

from vllm_stateful.adapters import fit
from vllm_stateful.adapters.frontend import cache_diagnostics, session_affinity
from vllm_stateful.adapters.frontend.identity import (
    TenantMiddleware,
    keeps_sessions,
    stand_aside,
    tenant_isolation,
)
from vllm_stateful.adapters.frontend.metrics_exporter import MetricsExporter
from vllm_stateful.adapters.frontend.openai_diagnostics import OpenAIDiagnostics
from vllm_stateful.adapters.frontend.page import page_router
from vllm_stateful.adapters.frontend.prompt_sender import ask_for_deltas
from vllm_stateful.adapters.frontend.request_validation import validate_plain_messages
from vllm_stateful.adapters.frontend.session_header import SessionHeader
from vllm_stateful.adapters.frontend.session_routes import ask_all, router
from vllm_stateful.adapters.frontend.turn_tracing import Spans
from vllm_stateful.compat.ledger import patch_of
from vllm_stateful.config import is_enabled, process_config, set_by_profile
from vllm_stateful.observe.diagnosis_counts import DIAGNOSIS_COUNTS
from vllm_stateful.observe.hint_counts import HINT_COUNTS
from vllm_stateful.observe.prompt_counts import PROMPT_COUNTS
from vllm_stateful.observe.response_counts import RESPONSE_COUNTS
from vllm_stateful.observe.tool_call_counts import TOOL_CALL_COUNTS
from vllm_stateful.transport.wire import STATS

logger = init_logger("vllm.stateful")

ASK_SECONDS = 30.0
"""The time limit of the first question to the engine."""

POLL_SECONDS, MOST_POLL_SECONDS = 1.0, 60.0
"""Seconds between two questions to the engine, and the most of them while it does not answer."""


class StatefulEndpoint:
    """Our ``EndpointPlugin`` for vLLM: routes, and a task that keeps ``/metrics`` current."""

    name = "stateful"
    required_tasks: tuple[str, ...] | None = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes and our middleware; nothing when the plugin is not enabled."""
        if _is_on():
            app.include_router(router)
            app.include_router(page_router)
            app.add_middleware(TenantMiddleware)
            app.add_middleware(OpenAIDiagnostics)
            app.add_middleware(
                SessionHeader, is_on=keeps_sessions, is_tenant_by_key=tenant_isolation
            )
            if "messages" not in process_config().disable:
                validate_plain_messages(app)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Ask the engine whether it keeps sessions, and start the metrics poll.

        Of several API servers, only the first keeps asking for the engine's totals.
        """
        if not _is_on() or engine_client is None:
            return
        _say_profile()
        _warn_of_shared_media(engine_client)
        asks = getattr(engine_client.engine_core, "client_index", 0) == 0
        is_known = await _stand_aside_if_all_are_off(engine_client)
        ask_for_deltas(engine_client.engine_core)
        cache_diagnostics.watch(engine_client.engine_core)
        session_affinity.watch(engine_client.engine_core, patch_of("prompt-send").is_applied)
        poll = _poll(engine_client, MetricsExporter(), asks, is_known=is_known)
        state.stateful_poll = asyncio.create_task(poll)


def _say_profile() -> None:
    """Log in one line what ``--stateful-profile`` has set."""
    made = set_by_profile()
    if made:
        options = ", ".join(f"--stateful-{name.replace('_', '-')} {made[name]}" for name in made)
        logger.info("stateful: --stateful-profile %s sets %s", process_config().profile, options)


def _warn_of_shared_media(engine_client: Any) -> None:
    """Warn that tenants share the names of media, if our renderer does not separate them."""
    renderer = engine_client.renderer
    is_ours = type(renderer).__name__ == "StatefulHfRenderer"
    if renderer.model_config.is_multimodal_model and not is_ours and tenant_isolation():
        logger.warning(
            "stateful: %s renders the prompts: tenants share what they call by one uuid, as in "
            "stock vLLM",
            type(renderer).__name__,
        )


async def _stand_aside_if_all_are_off(engine_client: Any) -> bool:
    """Send requests on unchanged, if all engine cores serve as stock vLLM.

    Returns:
        Whether the engine cores have answered.
    """
    try:
        answers = await asyncio.wait_for(ask_all(engine_client, STATS, {}), ASK_SECONDS)
    except Exception as error:  # any error of the engine; `_poll` asks again
        logger.warning("stateful: the engine did not say whether sessions are kept: %r", error)
        return False
    reasons = [answer["off"] for answer in answers if "off" in answer]
    if reasons and len(reasons) == len(answers):
        stand_aside(reasons[0])
        logger.warning(
            "stateful: the engine keeps no sessions, so requests reach it as they came: no session "
            "id of ours, and no salt by API key unless answers are kept. Reason: %s",
            reasons[0],
        )
    return True


def _is_on() -> bool:
    """Whether the plugin serves in this process: it is asked for, and it fits this vLLM."""
    return is_enabled() and fit.off_reason() is None and patch_of("engine-utility").is_applied


async def _poll(
    engine_client: Any, exporter: MetricsExporter, asks_engine: bool, *, is_known: bool
) -> None:
    ask_at, pause = 0.0, POLL_SECONDS
    spans = Spans(engine_client) if asks_engine else None
    while not engine_client.errored:
        is_known = is_known or await _stand_aside_if_all_are_off(engine_client)
        exporter.update_own(
            PROMPT_COUNTS.snapshot()
            | RESPONSE_COUNTS.snapshot()
            | TOOL_CALL_COUNTS.snapshot()
            | DIAGNOSIS_COUNTS.snapshot()
            | HINT_COUNTS.snapshot()
        )
        try:
            if asks_engine and time.monotonic() >= ask_at:
                exporter.update(await ask_all(engine_client, STATS, {}))
                pause = POLL_SECONDS
        except Exception as error:  # any error of the engine
            if pause == POLL_SECONDS:
                logger.warning("stateful: no metrics from the engine: %r", error)
            pause = min(2 * pause, MOST_POLL_SECONDS)
            ask_at = time.monotonic() + pause
        if spans is not None and time.monotonic() >= ask_at:
            await spans.send()
        await asyncio.sleep(POLL_SECONDS)
