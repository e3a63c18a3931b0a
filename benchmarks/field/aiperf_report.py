# SPDX-License-Identifier: Apache-2.0
"""What one run of AIPerf found, and the tables of ``benchmarks.field.aiperf``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.servers import PLUGIN, STOCK
from benchmarks.serving.tables import markdown, percentile, ratio

EXPORT = "profile_export_aiperf.json"
PROMPT, CACHED = "vllm:prompt_tokens_total", "vllm:prompt_tokens_cached_total"
FINISHED, PREEMPTED = "vllm:request_success_total", "vllm:num_preemptions_total"


class BadExportError(Exception):
    """AIPerf did not finish, or did not write what AIPerf 0.13 writes."""


@dataclass(frozen=True)
class Run:
    """One run of AIPerf against one server.

    Attributes:
        share: Of the sessions' tokens, what the KV cache holds.
        requests: That were answered.
        errors: Requests that failed.
        ttft_ms_p50: To the first chunk with text; all times are AIPerf's.
        itl_ms_p50: From the first chunk to the last, by the number of tokens less one.
        latency_ms_p50: To the end of the answer.
        prompt_tokens: As the server counts them.
        cached_tokens: Of these, what it did not compute.
        preemptions: Times that a request was stopped to make room.
    """

    side: str
    share: float
    concurrency: int
    round: int
    requests: int
    errors: int
    seconds: float
    requests_per_s: float
    output_tokens_per_s: float
    ttft_ms_p50: float
    ttft_ms_p90: float
    ttft_ms_p99: float
    itl_ms_p50: float
    itl_ms_p99: float
    latency_ms_p50: float
    latency_ms_p99: float
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    preemptions: int

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that the server computed."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def cell(self) -> tuple[float, int]:
        """What both sides have in common, over all rounds."""
        return self.share, self.concurrency


BETTER_WHEN_LESS = {
    "TTFT p50": "ttft_ms_p50",
    "TTFT p90": "ttft_ms_p90",
    "TTFT p99": "ttft_ms_p99",
    "ITL p50": "itl_ms_p50",
    "ITL p99": "itl_ms_p99",
    "latency p50": "latency_ms_p50",
    "latency p99": "latency_ms_p99",
    "tokens computed": "computed_tokens",
}
BETTER_WHEN_MORE = {"requests/s": "requests_per_s", "output tokens/s": "output_tokens_per_s"}


def read_run(
    folder: Path,
    grown: Mapping[str, float],
    *,
    side: str,
    share: float,
    concurrency: int,
    number: int,
) -> Run:
    """One run, from the folder that AIPerf wrote and the growth of the server's totals.

    Raises:
        BadExportError: the run was cancelled or cut off, or the file lacks a figure.
    """
    path = folder / EXPORT
    try:
        found = json.loads(path.read_text())
        if found["was_cancelled"] or not found["is_complete"]:
            raise BadExportError(f"AIPerf did not finish: {found.get('incomplete_reason')}")
        times = ("time_to_first_token", "inter_token_latency", "request_latency")
        first, between, whole = (found[name] for name in times)
        return Run(
            side=side,
            share=share,
            concurrency=concurrency,
            round=number,
            requests=int(found["request_count"]["avg"]),
            errors=int((found.get("error_request_count") or {"avg": 0})["avg"]),
            seconds=found["benchmark_duration"]["avg"],
            requests_per_s=found["request_throughput"]["avg"],
            output_tokens_per_s=found["output_token_throughput"]["avg"],
            ttft_ms_p50=first["p50"],
            ttft_ms_p90=first["p90"],
            ttft_ms_p99=first["p99"],
            itl_ms_p50=between["p50"],
            itl_ms_p99=between["p99"],
            latency_ms_p50=whole["p50"],
            latency_ms_p99=whole["p99"],
            output_tokens=int(found["total_usage_completion_tokens"]["avg"]),
            prompt_tokens=int(grown[PROMPT]),
            cached_tokens=int(grown[CACHED]),
            preemptions=int(grown[PREEMPTED]),
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BadExportError(f"{path}: {error!r}") from error


def totals(figures: Mapping[str, float]) -> dict[str, float]:
    """The server's totals that a run needs, over all their labels.

    Raises:
        BadExportError: the server has no such total.
    """
    sums: dict[str, float] = {}
    for key, value in figures.items():
        name = key.partition("{")[0]
        if name in (PROMPT, CACHED, FINISHED, PREEMPTED):
            sums[name] = sums.get(name, 0.0) + value
    missing = {PROMPT, CACHED, FINISHED, PREEMPTED} - set(sums)
    if missing:
        raise BadExportError(f"/metrics has no {', '.join(sorted(missing))}")
    return sums


def run_table(runs: Iterable[Run]) -> str:
    """One line for each run."""
    head = ["cache", "at once", "round", "side", "requests/s", "output tokens/s"]
    head += ["TTFT ms, p50 / p90 / p99", "ITL ms, p50 / p99", "latency ms, p50 / p99"]
    head += ["tokens cached", "tokens computed", "preempted", "errors"]
    rows = [
        [
            f"{run.share:.0%}",
            f"{run.concurrency}",
            f"{run.round + 1}",
            run.side,
            f"{run.requests_per_s:.2f}",
            f"{run.output_tokens_per_s:.0f}",
            f"{run.ttft_ms_p50:,.0f} / {run.ttft_ms_p90:,.0f} / {run.ttft_ms_p99:,.0f}",
            f"{run.itl_ms_p50:,.1f} / {run.itl_ms_p99:,.1f}",
            f"{run.latency_ms_p50:,.0f} / {run.latency_ms_p99:,.0f}",
            f"{run.cached_tokens:,}",
            f"{run.computed_tokens:,}",
            f"{run.preemptions}",
            f"{run.errors}",
        ]
        for run in sorted(runs, key=lambda run: (*run.cell, run.round, run.side != STOCK))
    ]
    return markdown(head, rows)


def ratio_table(runs: Sequence[Run]) -> str:
    """How many times better the plugin is; the medians of the rounds are compared."""
    columns = BETTER_WHEN_MORE | BETTER_WHEN_LESS
    rows = []
    for cell in sorted({run.cell for run in runs}):
        sides = [_medians(runs, cell, side) for side in (STOCK, PLUGIN)]
        stock, plugin = sides
        more = [ratio(plugin[name], stock[name]) for name in BETTER_WHEN_MORE.values()]
        less = [ratio(stock[name], plugin[name]) for name in BETTER_WHEN_LESS.values()]
        rows.append([f"{cell[0]:.0%}", f"{cell[1]}", *more, *less])
    return markdown(["cache", "at once", *columns], rows)


def _medians(runs: Iterable[Run], cell: tuple[float, int], side: str) -> dict[str, Any]:
    found = [run for run in runs if run.cell == cell and run.side == side]
    names = (*BETTER_WHEN_MORE.values(), *BETTER_WHEN_LESS.values())
    return {name: percentile([getattr(run, name) for run in found], 0.5) for name in names}
