# SPDX-License-Identifier: Apache-2.0
"""Tables of the burst benchmark."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from benchmarks.serving.servers import PLUGIN, SIDES, STOCK
from benchmarks.serving.tables import markdown, percentile, ratio


@dataclass
class Sample:
    """One request of a burst to one side; where it failed, `error` says how.

    Attributes:
        sent_s: After the first request of the burst.
        ttft_ms: From sending the request to the first event with text.
        least_prefill: Of the whole burst: one prefix and all private ends.
    """

    side: str
    block_size: int
    budget: str
    variant: str
    burst: str
    agent: int
    least_prefill: int
    sent_s: float = 0.0
    ttft_ms: float = 0.0
    total_ms: float = 0.0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    text: str = ""
    error: str = ""

    @property
    def setting(self) -> tuple[int, str, str]:
        return self.block_size, self.budget, self.variant


@dataclass(frozen=True)
class Row:
    """One variant under one setting, all bursts; by side.

    Attributes:
        prefill: Prompt tokens that a burst computed, median over the bursts.
        span_ms: From the first request to the last answer of a burst, median over the bursts.
        num_other_answers: Sub-agents whose answers differ between the sides.
    """

    block_size: int
    budget: str
    variant: str
    num_bursts: int
    least_prefill: float
    prefill: dict[str, float]
    ttft_ms: dict[str, dict[str, float]]
    total_ms: dict[str, dict[str, float]]
    span_ms: dict[str, float]
    num_failed: int
    num_other_answers: int


def make_rows(samples: Sequence[Sample]) -> list[Row]:
    """One row for each variant under each setting, in the order in which they were played."""
    settings = dict.fromkeys(sample.setting for sample in samples)
    return [_row([s for s in samples if s.setting == setting]) for setting in settings]


def _row(samples: Sequence[Sample]) -> Row:
    answered = [s for s in samples if not s.error]
    sides = {side: [s for s in answered if s.side == side] for side in SIDES}
    bursts = {side: _bursts(found) for side, found in sides.items()}
    texts = {side: {(s.burst, s.agent): s.text for s in found} for side, found in sides.items()}
    both = texts[STOCK].keys() & texts[PLUGIN].keys()

    def times(pick: str) -> dict[str, dict[str, float]]:
        values = {side: [getattr(s, pick) for s in found] for side, found in sides.items()}
        return {
            side: {"median": percentile(found, 0.5), "p99": percentile(found, 0.99)}
            for side, found in values.items()
        }

    return Row(
        *samples[0].setting,
        len({sample.burst for sample in samples}),
        fmean(sample.least_prefill for sample in samples),
        {
            side: _median(
                [sum(s.num_prompt_tokens - s.num_cached_tokens for s in b) for b in found]
            )
            for side, found in bursts.items()
        },
        times("ttft_ms"),
        times("total_ms"),
        {
            side: _median([max(s.sent_s * 1000 + s.total_ms for s in b) for b in found])
            for side, found in bursts.items()
        },
        len(samples) - len(answered),
        sum(texts[STOCK][key] != texts[PLUGIN][key] for key in both),
    )


def _bursts(samples: Sequence[Sample]) -> list[list[Sample]]:
    return [[s for s in samples if s.burst == b] for b in dict.fromkeys(s.burst for s in samples)]


def _median(values: Sequence[float]) -> float:
    return median(values) if values else float("nan")


def table(rows: Sequence[Row]) -> str:
    """Times in seconds; prefill and the whole burst are medians over the bursts."""
    head = [
        "block",
        "budget",
        "burst",
        "bursts",
        "least prefill",
        *(f"prefill, {s}" for s in SIDES),
    ]
    head += [f"TTFT {side} median / p99" for side in SIDES]
    head += [f"answer {side} median / p99" for side in SIDES]
    head += ["whole burst", "ratio", "failed", "other answers"]
    cells = [
        [
            str(row.block_size),
            row.budget,
            row.variant,
            str(row.num_bursts),
            f"{row.least_prefill:.0f}",
            *(f"{row.prefill[side]:.0f}" for side in SIDES),
            *(_pair(row.ttft_ms[side]) for side in SIDES),
            *(_pair(row.total_ms[side]) for side in SIDES),
            " / ".join(f"{row.span_ms[side] / 1000:.2f}" for side in SIDES),
            ratio(row.span_ms[STOCK], row.span_ms[PLUGIN]),
            str(row.num_failed),
            str(row.num_other_answers),
        ]
        for row in rows
    ]
    return markdown(head, cells)


def _pair(times: dict[str, float]) -> str:
    return f"{times['median'] / 1000:.2f} / {times['p99'] / 1000:.2f}"


def faults(samples: Sequence[Sample]) -> list[str]:
    """Every failed request."""
    return [
        f"failed: {s.side}, block {s.block_size}, burst {s.burst}, agent {s.agent}: {s.error}"
        for s in samples
        if s.error
    ]


def document(about: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """All but the samples."""
    return {"about": about, "rows": [asdict(row) for row in rows]}
