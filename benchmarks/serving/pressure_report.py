# SPDX-License-Identifier: Apache-2.0
"""Tables and results of the pressure benchmark."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.serving.pressure_capacity import live
from benchmarks.serving.pressure_load import KINDS, ONE_SHOT, TOOL_TURN, USER_TURN, Load
from benchmarks.serving.pressure_play import Sample, busy_s, num_planned
from benchmarks.serving.servers import PLUGIN, SIDES, STOCK
from benchmarks.serving.tables import markdown, percentile, ratio

RETURNING, ALL = "both turns", "all"
METRICS = ("vllm_stateful_", "vllm:num_preemptions", "vllm:prefix_cache_")
_PREEMPTIONS = "vllm:num_preemptions_total"
_SHARES = {"median": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass
class Run:
    """One load on one side.

    Attributes:
        num_planned: Requests of the load; those behind a failed one are never sent.
        metrics: What counters grew by in the run, and where gauges stood at its end.
    """

    side: str
    round: int
    num_planned: int
    samples: list[Sample]
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def num_failed(self) -> int:
        return sum(bool(sample.error) for sample in self.samples)

    @property
    def num_prefilled(self) -> int:
        return sum(sample.num_computed_tokens for sample in self.samples)

    @property
    def num_preempted(self) -> float:
        found = [self.metrics[name] for name in self.metrics if name.startswith(_PREEMPTIONS)]
        return sum(found)

    @property
    def busy_share(self) -> float:
        """Of the time up to the last answer."""
        last_s = max((sample.end_s for sample in self.samples), default=0.0)
        return busy_s(self.samples) / last_s if last_s else 0.0

    def summary(self) -> dict[str, Any]:
        """All but the samples."""
        return {
            "side": self.side,
            "round": self.round,
            "planned": self.num_planned,
            "sent": len(self.samples),
            "failed": self.num_failed,
            "other_answers": sum(not sample.is_equal for sample in self.samples),
            "prompts_of_other_length": sum(map(_has_other_length, self.samples)),
            "prefilled_tokens": self.num_prefilled,
            "busy_share": self.busy_share,
            "preemptions": self.num_preempted,
            "last_answer_s": max((sample.end_s for sample in self.samples), default=0.0),
            "metrics": self.metrics,
        }


def _has_other_length(sample: Sample) -> bool:
    """A prompt of a session that is not as long as the load says: the template is another one."""
    is_known = not sample.error and sample.kind != ONE_SHOT
    return is_known and sample.num_prompt_tokens != sample.num_planned_tokens


def grown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Counters as differences, gauges as they are; only what this benchmark is about."""
    found = {}
    for name, value in after.items():
        if name.startswith(METRICS) and "_created" not in name:
            is_counter = name.partition("{")[0].endswith(("_total", "_sum", "_count"))
            found[name] = value - before.get(name, 0.0) if is_counter else value
    return found


@dataclass(frozen=True)
class Row:
    """The requests of one kind, all rounds; by side, and there by percentile."""

    kind: str
    num: dict[str, int]
    ttft_ms: dict[str, dict[str, float]]
    total_ms: dict[str, dict[str, float]]
    prefilled_tokens: dict[str, int]
    prompt_tokens: dict[str, int]


def make_rows(runs: Sequence[Run]) -> list[Row]:
    """One row for each kind that came, one for turns that come back, and one for all."""
    answered = [s for run in runs for s in run.samples if not s.error]
    groups = {kind: [s for s in answered if s.kind == kind] for kind in (TOOL_TURN, USER_TURN)}
    groups[RETURNING] = [s for s in answered if s.kind in (TOOL_TURN, USER_TURN)]
    groups |= {kind: [s for s in answered if s.kind == kind] for kind in KINDS}
    groups[ALL] = answered
    return [_row(kind, samples) for kind, samples in groups.items() if samples]


def _row(kind: str, samples: Sequence[Sample]) -> Row:
    sides = {side: [s for s in samples if s.side == side] for side in SIDES}

    def percentiles(pick: str) -> dict[str, dict[str, float]]:
        return {
            side: {
                name: percentile([getattr(s, pick) for s in found], share)
                for name, share in _SHARES.items()
            }
            for side, found in sides.items()
        }

    return Row(
        kind,
        {side: len(found) for side, found in sides.items()},
        percentiles("ttft_ms"),
        percentiles("total_ms"),
        {side: sum(s.num_computed_tokens for s in found) for side, found in sides.items()},
        {side: sum(s.num_prompt_tokens for s in found) for side, found in sides.items()},
    )


def latency_table(rows: Sequence[Row], what: str) -> str:
    """Of `ttft_ms` or `total_ms`, in seconds: median / p90 / p99, and stock divided by plugin."""
    head = ["requests", "number", *SIDES, *(f"ratio {name}" for name in _SHARES)]
    cells = []
    for row in rows:
        times: dict[str, dict[str, float]] = getattr(row, what)
        shown = [" / ".join(f"{times[side][n] / 1000:.2f}" for n in _SHARES) for side in SIDES]
        ratios = [ratio(times[STOCK][name], times[PLUGIN][name]) for name in _SHARES]
        cells.append([row.kind, _numbers(row.num), *shown, *ratios])
    return markdown(head, cells)


def prefill_table(rows: Sequence[Row]) -> str:
    """Prompt tokens that were computed, by kind."""
    head = ["requests", "number", "prompt tokens", *(f"computed, {s}" for s in SIDES), "ratio"]
    cells = []
    for row in rows:
        computed = row.prefilled_tokens
        shown = [str(computed[side]) for side in SIDES]
        shown.append(ratio(computed[STOCK], computed[PLUGIN]))
        cells.append([row.kind, _numbers(row.num), _numbers(row.prompt_tokens), *shown])
    return markdown(head, cells)


def _numbers(by_side: dict[str, int]) -> str:
    """Once where both sides have the same."""
    return " / ".join(str(number) for number in dict.fromkeys(by_side[side] for side in SIDES))


def round_table(runs: Sequence[Run], loads: Sequence[Load]) -> str:
    """One line for each round; what failed is shown here."""
    head = ["round", "live sessions", "live tokens", "least prefill", "prefill, stock", "plugin"]
    head += ["ratio", "busy", "preemptions", "failed", "not sent", "other answers"]
    cells = []
    for number, load in enumerate(loads, 1):
        sides = {run.side: run for run in runs if run.round == number}
        if len(sides) < len(SIDES):
            continue
        stock, plugin = (sides[side] for side in SIDES)
        shots = sum(s.num_prompt_tokens for s in plugin.samples if s.kind == ONE_SHOT)
        summaries = [stock.summary(), plugin.summary()]
        unsent = [str(run["planned"] - run["sent"]) for run in summaries]
        cells.append(
            [
                str(number),
                f"{live(load).num_sessions:.1f}",
                f"{live(load).num_tokens:.0f}",
                str(load.least_prefill + shots),
                str(stock.num_prefilled),
                str(plugin.num_prefilled),
                ratio(stock.num_prefilled, plugin.num_prefilled),
                " / ".join(f"{run['busy_share']:.0%}" for run in summaries),
                " / ".join(f"{run['preemptions']:.0f}" for run in summaries),
                " / ".join(str(run["failed"]) for run in summaries),
                " / ".join(unsent),
                " / ".join(str(run["other_answers"]) for run in summaries),
            ]
        )
    return markdown(head, cells)


def faults(runs: Sequence[Run]) -> list[str]:
    """Everything that a reader of the tables has to know: failures, and odd lengths."""
    found = [
        f"failed: {run.side}, round {run.round}, {s.who}, request {s.turn}: {s.error}"
        for run in runs
        for s in run.samples
        if s.error
    ]
    for run in runs:
        number = run.summary()["prompts_of_other_length"]
        if number:
            found.append(f"{run.side}, round {run.round}: {number} prompts of another length")
    return found


def document(
    about: dict[str, Any], loads: Sequence[Load], cache: dict[str, Any], runs: Sequence[Run]
) -> dict[str, Any]:
    """All but the samples."""
    rounds = [
        {
            "round": number,
            "sessions": len(load.sessions),
            "conversations": [session.conversation for session in load.sessions],
            "requests": num_planned(load),
            "live": asdict(live(load)),
            "shared_tokens": list(load.shared_tokens.values()),
            "least_prefill_of_sessions": load.least_prefill,
        }
        for number, load in enumerate(loads, 1)
    ]
    rows = [asdict(row) for row in make_rows(runs)]
    return {
        "about": about,
        "cache": cache,
        "rounds": rounds,
        "rows": rows,
        "runs": [run.summary() for run in runs],
    }
