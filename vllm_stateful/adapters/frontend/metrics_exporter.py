# SPDX-License-Identifier: Apache-2.0
"""Exports Prometheus metrics from the totals of the API process and of the engine cores."""

from __future__ import annotations

from collections import Counter as Counts
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from vllm_stateful.observe.metrics import METRICS, OFF, RESUME_BUCKETS_S, Metric


class MetricsExporter:
    """Turns running totals into increments of Prometheus metrics.

    Args:
        registry: the registry for the metrics. vLLM's ``/metrics`` serves the default one.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._made = {metric: _make(metric, registry) for metric in METRICS}
        self._own = [metric for metric in METRICS if metric.process == "api"]
        self._engine = [metric for metric in METRICS if metric.process == "engine"]
        self._totals: dict[tuple[int, str, str], float] = {}
        self._reasons: set[str] = set()
        """The reasons why engines are or were off."""

    def update(self, snapshots: list[dict[str, Any]]) -> None:
        """Apply one snapshot per engine; an engine that is off sends ``{"off": reason}``."""
        live = [(rank, s) for rank, s in enumerate(snapshots) if OFF not in s]
        self._apply([metric for metric in self._engine if metric.key != OFF], live)
        off = Counts(s[OFF] for s in snapshots if OFF in s)
        for metric in self._engine:
            if metric.key == OFF:
                for reason in off.keys() | self._reasons:
                    self._made[metric].labels(reason).set(off[reason])
        self._reasons |= off.keys()

    def update_own(self, snapshot: dict[str, Any]) -> None:
        """Apply the totals of this API process."""
        self._apply(self._own, [(0, snapshot)])

    def _apply(self, metrics: list[Metric], live: list[tuple[int, dict[str, Any]]]) -> None:
        for metric in metrics:
            made = self._made[metric]
            if metric.kind == "gauge":
                made.set(sum(snapshot[metric.key] for _, snapshot in live))
                continue
            for rank, snapshot in live:
                self._advance(metric, made, rank, snapshot[metric.key])

    def _advance(self, metric: Metric, made: Any, rank: int, value: Any) -> None:
        if metric.kind == "histogram":
            for seconds in value:
                made.observe(seconds)
        elif metric.label is None:
            made.inc(self._increment(metric, rank, "", value))
        else:
            for label, total in value.items():
                made.labels(label).inc(self._increment(metric, rank, label, total))

    def _increment(self, metric: Metric, rank: int, label: str, total: float) -> float:
        """The increase since the last snapshot; an engine that restarted counts from zero."""
        key = (rank, metric.name, label)
        before = self._totals.get(key, 0)
        self._totals[key] = total
        return total - before if total >= before else total


def _make(metric: Metric, registry: CollectorRegistry) -> Any:
    labels = [metric.label] if metric.label else []
    if metric.kind == "counter":
        return Counter(metric.name, metric.help, labels, registry=registry)
    if metric.kind == "gauge":
        return Gauge(
            metric.name, metric.help, labels, registry=registry, multiprocess_mode=_across(metric)
        )
    return Histogram(metric.name, metric.help, labels, registry=registry, buckets=RESUME_BUCKETS_S)


def _across(metric: Metric) -> str:
    """How Prometheus joins the gauges of several API servers."""
    return "livesum" if metric.process == "api" else "mostrecent"
