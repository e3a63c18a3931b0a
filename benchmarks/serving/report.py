# SPDX-License-Identifier: Apache-2.0
"""Tables and files of a run."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.serving.servers import PLUGIN, SIDES, STOCK
from benchmarks.serving.stages import OUTSIDE, STAGES, depth

MEASURED, PROBED = "measured", "probed"
STAGE_CONTEXT = 106_000


@dataclass
class Sample:
    """One request to one side; times in milliseconds.

    Attributes:
        kind: Measured, or made with the event-loop probe on, which no time is taken from.
        host_ms: Time to first token without the attention of the prompt.
        stages_ms: Time of each stage, by its name.
        block_ms: The longest time for which the event loop stood still while it had a core.
        work_ms: The longest work of the event loop at once, in CPU time.
    """

    side: str
    num_messages: int
    context: int
    turn: int
    kind: str
    num_prompt_tokens: int
    num_cached_tokens: int
    ttft_ms: float
    first_text_ms: float
    total_ms: float
    text: str
    host_ms: float | None = None
    stages_ms: dict[str, float] = field(default_factory=dict)
    block_ms: float | None = None
    work_ms: float | None = None


@dataclass(frozen=True)
class Row:
    """One conversation on both sides."""

    num_messages: int
    context: int
    num_prompt_tokens: float
    num_turns: int
    num_equal_answers: int
    ttft_ms: dict[str, float]
    ttft_p90_ms: dict[str, float]
    host_ms: dict[str, float]
    host_p90_ms: dict[str, float]
    cached_share: dict[str, float]
    block_ms: dict[str, float]
    block_max_ms: dict[str, float]
    work_ms: dict[str, float]
    work_max_ms: dict[str, float]

    @property
    def ratio(self) -> float:
        return self.ttft_ms[STOCK] / self.ttft_ms[PLUGIN]


def make_rows(samples: Sequence[Sample]) -> list[Row]:
    """One row for each conversation, in the order in which they were played."""
    keys = dict.fromkeys((sample.num_messages, sample.context) for sample in samples)
    return [_row([s for s in samples if (s.num_messages, s.context) == key]) for key in keys]


def _row(samples: list[Sample]) -> Row:
    measured = {side: _of(samples, side, MEASURED) for side in SIDES}
    probed = {side: _of(samples, side, PROBED) for side in SIDES}
    texts = [[s.text for s in samples if s.side == side] for side in SIDES]
    has_host = all(s.host_ms is not None for side in SIDES for s in measured[side])

    def each(
        value: Callable[[list[float]], float], pick: Callable[[Sample], Any]
    ) -> dict[str, float]:
        return {side: value([pick(sample) for sample in measured[side]]) for side in SIDES}

    def each_probed(
        value: Callable[[list[float]], float], pick: Callable[[Sample], float]
    ) -> dict[str, float]:
        return {
            side: value([pick(sample) for sample in probed[side]]) for side in SIDES if probed[side]
        }

    return Row(
        samples[0].num_messages,
        samples[0].context,
        median(sample.num_prompt_tokens for sample in measured[STOCK]),
        len(measured[STOCK]),
        sum(stock == plugin for stock, plugin in zip(*texts, strict=True)),
        each(median, lambda s: s.ttft_ms),
        each(p90, lambda s: s.ttft_ms),
        each(median, lambda s: s.host_ms) if has_host else {},
        each(p90, lambda s: s.host_ms) if has_host else {},
        each(median, lambda s: s.num_cached_tokens / s.num_prompt_tokens),
        each_probed(median, lambda s: s.block_ms or 0.0),
        each_probed(max, lambda s: s.block_ms or 0.0),
        each_probed(median, lambda s: s.work_ms or 0.0),
        each_probed(max, lambda s: s.work_ms or 0.0),
    )


def _of(samples: Iterable[Sample], side: str, kind: str) -> list[Sample]:
    return [sample for sample in samples if sample.side == side and sample.kind == kind]


def p90(values: Sequence[float]) -> float:
    """The 90th percentile, between the values; the only value where there is one."""
    return quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]


def ttft_table(rows: Sequence[Row], num_answers: int) -> str:
    """Time to first token, and host time in it: median and, behind the slash, p90."""
    head = ["messages", "context", "prompt tokens", "TTFT stock", "TTFT plugin", "ratio"]
    head += ["host stock", "host plugin", "cached stock", "cached plugin", "equal answers"]
    cells = [
        [
            str(row.num_messages),
            str(row.context),
            f"{row.num_prompt_tokens:.0f}",
            *(_pair(row.ttft_ms, row.ttft_p90_ms, side) for side in SIDES),
            f"{row.ratio:.2f}",
            *(_pair(row.host_ms, row.host_p90_ms, side) for side in SIDES),
            *(f"{row.cached_share[side]:.1%}" for side in SIDES),
            f"{row.num_equal_answers}/{num_answers}",
        ]
        for row in rows
    ]
    return _table("Time to first token and host time in it (ms, median / p90)", head, cells)


def _pair(medians: dict[str, float], others: dict[str, float], side: str) -> str:
    return f"{medians[side]:.1f} / {others[side]:.1f}" if medians else "-"


def loop_table(rows: Sequence[Row]) -> str:
    """The longest time that the API process's event loop stood still in a turn, and worked."""
    head = ["messages", "context"]
    head += [f"{what} {side}" for what in ("blocked", "work") for side in SIDES]
    cells = [
        [
            str(row.num_messages),
            str(row.context),
            *(f"{_block(row.block_ms[s])} / {_block(row.block_max_ms[s])}" for s in SIDES),
            *(_pair(row.work_ms, row.work_max_ms, side) for side in SIDES),
        ]
        for row in rows
        if row.block_ms
    ]
    title = "Longest block (resolution 2 ms) and longest work of the API server's event loop in a "
    return _table(f"{title}turn (ms, median / largest)", head, cells) if cells else ""


def _block(milliseconds: float) -> str:
    return f"{milliseconds:.1f}" if milliseconds > 2 else "< 2"


def stage_contexts(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """The conversations whose stages are shown: the smallest, and the one nearest 106k tokens."""
    picked: list[tuple[int, int]] = []
    for num_messages in dict.fromkeys(row.num_messages for row in rows):
        contexts = [row.context for row in rows if row.num_messages == num_messages]
        large = min(contexts, key=lambda context: abs(context - STAGE_CONTEXT))
        picked += [(num_messages, context) for context in dict.fromkeys((min(contexts), large))]
    return picked


def stage_medians(
    samples: Sequence[Sample], num_messages: int, context: int
) -> dict[str, dict[str, float]]:
    """Median milliseconds of each stage on each side."""
    medians: dict[str, dict[str, float]] = {}
    for name in [*(stage.name for stage in STAGES), OUTSIDE]:
        medians[name] = {}
        for side in SIDES:
            found = [
                sample.stages_ms[name]
                for sample in _of(samples, side, MEASURED)
                if (sample.num_messages, sample.context) == (num_messages, context)
                and name in sample.stages_ms
            ]
            medians[name][side] = median(found) if found else 0.0
    return medians


def stage_table(samples: Sequence[Sample], num_messages: int, context: int) -> str:
    """The stages of one conversation; a stage that is a part of another stands further right."""
    medians = stage_medians(samples, num_messages, context)
    places = {stage.name: depth(stage) for stage in STAGES}
    processes = {stage.name: stage.process for stage in STAGES}
    head = ["process", "stage", *SIDES]
    cells = [
        [
            processes.get(name, ""),
            "  " * places.get(name, 0) + name,
            *(f"{medians[name][side]:.2f}" for side in SIDES),
        ]
        for name in medians
    ]
    title = f"Stages, {num_messages} messages, context {context} (ms, median)"
    return _table(title, head, cells, num_left=2)


def _table(
    title: str, head: Sequence[str], cells: Sequence[Sequence[str]], num_left: int = 0
) -> str:
    """Plain text; the first columns are aligned to the left, all others to the right."""
    columns = list(zip(head, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]

    def line(texts: Sequence[str]) -> str:
        parts = [
            text.ljust(width) if place < num_left else text.rjust(width)
            for place, (text, width) in enumerate(zip(texts, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([title, line(head), *map(line, cells)])


def save_json(
    path: Path, about: dict[str, Any], rows: Sequence[Row], samples: Sequence[Sample]
) -> None:
    """Everything that was measured, one sample a line; stages in the order of `stages`."""
    names = [*(stage.name for stage in STAGES), OUTSIDE]
    keys = ["side", "num_messages", "context", "turn", "kind", "num_prompt_tokens"]
    keys += ["num_cached_tokens", "ttft_ms", "first_text_ms", "total_ms", "host_ms", "block_ms"]
    keys += ["work_ms"]
    values = [[*_picked(s, keys), [_short(s.stages_ms.get(n)) for n in names]] for s in samples]
    document = {
        "about": about,
        "rows": [_rounded(asdict(row)) | {"ratio": _short(row.ratio)} for row in rows],
        "stage_medians_ms": [
            {
                "num_messages": num_messages,
                "context": context,
                "stages": _rounded(stage_medians(samples, num_messages, context)),
            }
            for num_messages, context in stage_contexts(rows)
            if any(sample.stages_ms for sample in samples)
        ],
        "stages": names,
        "sample_keys": [*keys, "stages_ms"],
    }
    lines = ",\n".join("  " + json.dumps(value) for value in values)
    head = json.dumps(document, indent=1).removesuffix("\n}")
    path.write_text(f'{head},\n "samples": [\n{lines}\n ]\n}}\n')


def _picked(sample: Sample, keys: Sequence[str]) -> list[Any]:
    return [_short(getattr(sample, key)) for key in keys]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return _short(value)


def _short(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value
