# SPDX-License-Identifier: Apache-2.0
"""Spans of turns in the trace of the client, sent to a collector by a real server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from live_server import LiveServer
from local_models import TINY

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

pytestmark = pytest.mark.e2e

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PLANTED = "planted words of a conversation"


class Collector(ThreadingHTTPServer):
    """Takes what an OTLP exporter sends over HTTP."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        bodies = self.bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def spans(self, name: str) -> list[Any]:
        """The spans of this name that have come."""
        requests = map(trace_service.ExportTraceServiceRequest.FromString, list(self.bodies))
        return [
            span
            for request in requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
            if span.name == name
        ]

    def waited_for(self, name: str, number: int) -> list[Any]:
        """The spans of this name, once so many have come."""
        deadline = time.monotonic() + 30
        while len(self.spans(name)) < number:
            assert time.monotonic() < deadline, f"no {number} spans {name}"
            time.sleep(0.1)
        return self.spans(name)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[str]:
    if not (TINY / "config.json").exists():
        pytest.skip("the tiny model is not built: run `make model`")
    log = tmp_path_factory.mktemp("traced") / "server.log"
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    options = ["--plugin", "stateful", "--stateful-explain", "text", "--max-model-len", "1024"]
    options += ["--served-model-name", "tiny", "--otlp-traces-endpoint", endpoint]
    environment = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
    environment["OTEL_BSP_SCHEDULE_DELAY"] = "100"
    with LiveServer(TINY, log, *options, environment=environment) as live:
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


def attribute(pair: Any) -> tuple[str, Any]:
    return pair.key, getattr(pair.value, pair.value.WhichOneof("value"))
