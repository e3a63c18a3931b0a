# SPDX-License-Identifier: Apache-2.0
"""API process: sends a span for each turn that has ended, with ``--otlp-traces-endpoint``.

The engine core notes which turns have ended, with the trace headers of their requests. The first
API server asks for them once a second. vLLM's tracer sends the spans, in the trace in which it
sends its own. So no engine step waits for a span.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllm_stateful.adapters.fit import is_fit
from vllm_stateful.observe.turn_span import SPAN_NAME, span_of


async def is_traced(engine_client: Any) -> bool:
    """Whether spans of turns are sent: an endpoint is given, and this vLLM fits."""
    return bool(await engine_client.is_tracing_enabled()) and is_fit("tracing", "api")


def send_spans(answers: Iterable[Mapping[str, Any]]) -> None:
    """Send the spans of the turns that engine cores have noted.

    Args:
        answers: one for each engine core, to ``ENDED``.
    """
    from vllm.tracing import extract_trace_context, instrument_manual

    for answer in answers:
        for ended in answer.get("ended", ()):
            span = span_of(ended["turn"], ended["at"])
            context = extract_trace_context(ended["headers"])
            instrument_manual(SPAN_NAME, span.start_ns, span.end_ns, span.attributes, context)
