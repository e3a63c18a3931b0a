# SPDX-License-Identifier: Apache-2.0
"""API process: sends a span for each turn that has ended, with ``--otlp-traces-endpoint``.

The engine core notes which turns have ended, with the trace headers of their requests. The first
API server asks for them once a second. vLLM's tracer sends the spans, in the trace in which it
sends its own. So no engine step waits for a span.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllm.logger import init_logger

from vllm_stateful.adapters.fit import is_fit
from vllm_stateful.adapters.frontend.session_routes import ask_all
from vllm_stateful.observe.turn_span import SPAN_NAME, span_of
from vllm_stateful.transport.wire import ENDED

logger = init_logger("vllm.stateful")


class Spans:
    """Asks the engine cores for turns that have ended, and sends their spans.

    Args:
        engine_client: vLLM's client of the engine cores.
    """

    def __init__(self, engine_client: Any) -> None:
        self._client = engine_client
        self._are_sent: bool | None = None
        """Whether spans are sent; None until it was asked."""
        self._has_failed = False

    async def send(self) -> None:
        """Send what has ended since the last call. What fails is logged once, and ends nothing."""
        try:
            if self._are_sent is None:
                self._are_sent = await is_traced(self._client)
            if self._are_sent:
                send_spans(await ask_all(self._client, ENDED, {}))
        except Exception as error:  # any error of the engine, or of the tracer
            if not self._has_failed:
                logger.warning("stateful: spans of turns were not sent: %r", error)
            self._has_failed = True


async def is_traced(engine_client: Any) -> bool:
    """Whether spans of turns are sent: an endpoint is given, and this vLLM fits."""
    return bool(await engine_client.is_tracing_enabled()) and is_fit("tracing", "api")


def send_spans(answers: Iterable[Mapping[str, Any]]) -> None:
    """Send the spans of the turns that engine cores have noted.

    Args:
        answers: one for each engine core, to ``ENDED``.
    """
    from vllm.tracing import extract_trace_context, instrument_manual

    for ended in [each for answer in answers for each in answer.get("ended", ())]:
        span = span_of(ended["turn"], ended["at"])
        context = extract_trace_context(ended["headers"])
        instrument_manual(SPAN_NAME, span.start_ns, span.end_ns, span.attributes, context)
