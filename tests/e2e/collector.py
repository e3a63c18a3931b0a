# SPDX-License-Identifier: Apache-2.0
"""A collector of OpenTelemetry spans, which keeps what a server sends."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

ENVIRONMENT = {
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
    "OTEL_BSP_SCHEDULE_DELAY": "100",
}
"""Of a server that sends to it."""


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

    @property
    def endpoint(self) -> str:
        """For ``--otlp-traces-endpoint``."""
        return f"http://127.0.0.1:{self.server_port}/v1/traces"

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


def attribute(pair: Any) -> tuple[str, Any]:
    return pair.key, getattr(pair.value, pair.value.WhichOneof("value"))
