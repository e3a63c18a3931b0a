# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus scrapes our metrics: every panel of the dashboard shows them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest, start_http_server

from benchmarks.demo.dashboard.panels import Shown, read_panels, shown
from benchmarks.demo.dashboard.prometheus import Prometheus, check_metrics, missing_programs
from benchmarks.ports import HOST, free_port
from vllm_stateful.adapters.frontend.metrics_exporter import MetricsExporter
from vllm_stateful.observe.metrics import METRICS, OFF, Metric

missing = missing_programs()
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(missing), reason=f"not on this machine: {', '.join(missing)}"),
]

SECONDS = 7


def total(metric: Metric, number: int) -> Any:
    """What a process says of a metric when it is asked for the n-th time."""
    if metric.kind == "histogram":
        return [0.001 * number]
    return {"one": number, "two": 2 * number} if metric.label else number


def update(exporter: MetricsExporter, number: int) -> None:
    """One poll of an engine core that keeps sessions, of one that is off, and of the process."""
    says = {metric.key: total(metric, number) for metric in METRICS if metric.key != OFF}
    exporter.update([says, {OFF: "a reason"}])
    exporter.update_own(says)


@pytest.fixture(scope="module")
def panels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Shown]]:
    registry = CollectorRegistry()
    exporter = MetricsExporter(registry)
    port = free_port()
    server, thread = start_http_server(port, HOST, registry)
    try:
        with Prometheus(tmp_path_factory.mktemp("prometheus")) as prometheus:
            start = time.time()
            update(exporter, 1)
            prometheus.scrape(f"http://{HOST}:{port}")
            for number in range(2, 2 + SECONDS):
                update(exporter, number)
                time.sleep(1)
            end = time.time()
            yield [
                shown(panel, [prometheus.over_time(query, start, end) for query in panel.queries])
                for panel in read_panels()
            ]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_no_panel_is_empty(panels: list[Shown]) -> None:
    assert [panel.title for panel in panels if panel.is_empty] == []
    assert [query for panel in panels for query in panel.empty_queries] == []


def test_what_rises_is_seen_to_rise(panels: list[Shown]) -> None:
    assert [panel.title for panel in panels if panel.all_zero] == []


def test_promtool_finds_no_fault(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    update(MetricsExporter(registry), 1)
    assert check_metrics(generate_latest(registry).decode()) == []
