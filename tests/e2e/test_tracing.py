# SPDX-License-Identifier: Apache-2.0
"""Spans of turns in the trace of the client, sent to a collector by a real server."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest
from collector import ENVIRONMENT, Collector, attribute
from live_server import LiveServer
from local_models import TINY

pytestmark = pytest.mark.e2e

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PLANTED = "planted words of a conversation"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[str]:
    if not (TINY / "config.json").exists():
        pytest.skip("the tiny model is not built: run `make model`")
    log = tmp_path_factory.mktemp("traced") / "server.log"
    options = ["--plugin", "stateful", "--stateful-explain", "text", "--max-model-len", "1024"]
    options += ["--served-model-name", "tiny", "--otlp-traces-endpoint", collector.endpoint]
    with LiveServer(TINY, log, *options, environment=ENVIRONMENT) as live:
        yield live.url
        assert live.process.poll() is None, live.last_words()


def test_a_turn_has_a_span_in_the_trace_of_its_request(url: str, collector: Collector) -> None:
    headers = {
        "X-Session-ID": "planted-session",
        "Authorization": "Bearer planted-key",
        "traceparent": f"00-{TRACE}-{PARENT}-01",
    }
    for prompt in (f"{PLANTED} " * 9, f"{PLANTED} " * 12, f"changed {PLANTED} " * 9):
        asked = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=asked, headers=headers, timeout=60)
        answer.raise_for_status()
    spans = collector.waited_for("vllm_stateful.turn", 3)
    stock = collector.waited_for("llm_request", 3)
    for span in [*spans, *stock]:
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    for span in spans:
        assert 0 < span.start_time_unix_nano < span.end_time_unix_nano < time.time_ns()
    told = [dict(map(attribute, span.attributes)) for span in spans]
    asked_for = [dict(map(attribute, span.attributes))["gen_ai.request.id"] for span in stock]
    for turn, request_id in zip(told, asked_for, strict=True):
        assert request_id.startswith(turn["gen_ai.request.id"])
    assert len({turn["gen_ai.conversation.id"] for turn in told}) == 1
    assert [turn["vllm_stateful.missed.cause"] for turn in told] == [
        "never_seen",
        "changed",
        "changed",
    ]
    assert told[1]["vllm_stateful.reused_tokens"] > 16
    assert all(b"planted" not in body for body in collector.bodies)


def test_without_trace_headers_a_turn_has_a_trace_of_its_own(
    url: str, collector: Collector
) -> None:
    asked = {"model": "tiny", "prompt": "one two three", "max_tokens": 4}
    httpx.post(f"{url}/v1/completions", json=asked, timeout=60).raise_for_status()
    span = collector.waited_for("vllm_stateful.turn", 4)[-1]
    assert span.parent_span_id == b""
    assert span.trace_id.hex() != TRACE
