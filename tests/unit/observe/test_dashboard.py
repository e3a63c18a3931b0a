# SPDX-License-Identifier: Apache-2.0
"""dashboards/vllm-stateful.json shows the metrics that exist, and all of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vllm_stateful.observe.metrics import METRICS, Metric

PATH = Path(__file__).parents[3] / "dashboards" / "vllm-stateful.json"
DASHBOARD = json.loads(PATH.read_text())

LEFT_OUT: dict[str, str] = {}
"""Metrics that the dashboard does not show, and why."""

PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]


def series(metric: Metric) -> set[str]:
    """The names under which Prometheus has a metric."""
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {metric.name + suffix for suffix in suffixes[metric.kind]}


def named(text: str) -> set[str]:
    return set(re.findall(r"vllm_stateful_\w+", text))


def test_every_query_asks_for_metrics_that_exist() -> None:
    known = set().union(*(series(metric) for metric in METRICS))
    variables = json.dumps(DASHBOARD["templating"])
    for query in [*QUERIES, variables]:
        assert named(query), query
        assert named(query) <= known, query


def test_every_metric_is_shown_or_left_out_for_a_reason() -> None:
    asked = set().union(*map(named, QUERIES))
    missing = {metric.name for metric in METRICS if not series(metric) & asked}
    assert missing == LEFT_OUT.keys()
    assert all(LEFT_OUT.values())


def test_every_label_is_one_of_its_metric() -> None:
    labels = {name: metric.label for metric in METRICS for name in series(metric)}
    for panel in PANELS:
        for target in panel["targets"]:
            by = re.findall(r"sum by \((\w+)\)", target["expr"])
            expected = {labels[name] for name in named(target["expr"])} - {None}
            if not by:
                continue
            assert set(by) == (expected or {"le"}), target["expr"]
            if expected:
                assert target["legendFormat"] == f"{{{{{by[0]}}}}}"


def test_the_dashboard_can_be_imported_anywhere() -> None:
    """It names no data source of ours; each panel has a place, a number and a title of its own."""
    first, second = DASHBOARD["templating"]["list"]
    assert (first["type"], first["query"], second["name"]) == (
        "datasource",
        "prometheus",
        "instance",
    )
    sources = {json.dumps(each["datasource"]) for each in [*PANELS, second]}
    sources |= {json.dumps(each["datasource"]) for panel in PANELS for each in panel["targets"]}
    assert sources == {json.dumps({"type": "prometheus", "uid": "${datasource}"})}
    assert "id" not in DASHBOARD
    for name in ("id", "title"):
        assert len({panel[name] for panel in PANELS}) == len(PANELS)
    assert all(panel["description"].endswith(".") for panel in PANELS)


def test_no_panel_lies_on_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place: dict[str, Any] = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + right, place["y"] + down)
            for right in range(place["w"])
            for down in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_prometheus_can_read_every_query(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no `promtool` on this machine")
    rules = [
        {"record": f"panel:query_{place}", "expr": query.replace("$__rate_interval", "1m")}
        for place, query in enumerate(QUERIES)
    ]
    path = tmp_path / "rules.yml"
    path.write_text(
        json.dumps({"groups": [{"name": "dashboard", "rules": rules}]})
    )  # YAML has JSON
    done = subprocess.run([promtool, "check", "rules", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(QUERIES)} rules found" in done.stdout
