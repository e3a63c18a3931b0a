# SPDX-License-Identifier: Apache-2.0
"""The dashboard's panels and their queries, with Grafana's variables filled in."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.models import ROOT

DASHBOARD = ROOT / "dashboards" / "vllm-stateful.json"
SCRAPE_S = 1
STEP_S = 2
RATE_S = max(STEP_S + SCRAPE_S, 4 * SCRAPE_S)
"""Seconds of `$__rate_interval`, as Grafana's documentation has it."""
VARIABLES = {"$__rate_interval": f"{RATE_S}s", "$instance": ".*"}


@dataclass(frozen=True)
class Panel:
    """One panel, and its queries as Prometheus gets them."""

    title: str
    queries: tuple[str, ...]


@dataclass
class Shown:
    """What one panel showed.

    Attributes:
        series: Series with at least one number, over all queries.
        largest: The largest number, None where there was none.
        empty_queries: Queries that gave no number at all.
        all_zero: Names of series that were zero all the time.
    """

    title: str
    series: int = 0
    largest: float | None = None
    empty_queries: list[str] = field(default_factory=list)
    all_zero: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return self.series == 0

    @property
    def is_flat(self) -> bool:
        """Whether it shows nothing but zero."""
        return not self.is_empty and self.series == len(self.all_zero)


def read_panels(path: Path = DASHBOARD) -> list[Panel]:
    """The panels of the dashboard in its order, rows left out."""
    panels = json.loads(path.read_text())["panels"]
    return [
        Panel(panel["title"], tuple(filled(target["expr"]) for target in panel["targets"]))
        for panel in panels
        if panel["type"] != "row"
    ]


def filled(expr: str) -> str:
    """A query without variables. Raises ValueError where one is not known."""
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    if "$" in expr:
        raise ValueError(f"a variable is not known: {expr}")
    return expr


def shown(panel: Panel, results: Sequence[Sequence[dict[str, Any]]]) -> Shown:
    """Judge a panel by what Prometheus answered.

    Args:
        panel: of the dashboard.
        results: for each of its queries the `result` of `query_range`: a list of series with
            `metric` and `values`.
    """
    made = Shown(panel.title)
    for query, result in zip(panel.queries, results, strict=True):
        is_empty = True
        for series in result:
            numbers = [float(value) for _, value in series["values"]]
            numbers = [number for number in numbers if number == number]  # without NaN
            if not numbers:
                continue
            is_empty = False
            made.series += 1
            made.largest = max(numbers if made.largest is None else [*numbers, made.largest])
            if not any(numbers):
                made.all_zero.append(",".join(series["metric"].values()) or query)
        if is_empty:
            made.empty_queries.append(query)
    return made
