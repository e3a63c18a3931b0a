# SPDX-License-Identifier: Apache-2.0
"""The stages of a request, and what the timers of a server say about one request."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

API, CORE, WORKER = "api", "core", "worker"
ATTENTION = "attention forward"
EXECUTE = "execute_model"
UPDATE = "update_from_output"
LOOP_BLOCKED = "loop blocked"
LOOP_WORK = "loop work"
OUTSIDE = "outside all stages"
MISSING = "missing"


@dataclass(frozen=True)
class Stage:
    """A part of a request, timed wherever its target runs.

    Attributes:
        target: ``module:function`` or ``module:Class.method``; overrides count as well.
        inside: The stage that this one is a part of.
        runs_last: It runs behind the first token, up to the end of the answer.
    """

    name: str
    process: str
    target: str
    inside: str = ""
    runs_last: bool = False


_CHAT = "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat"
_RENDERER = "vllm.renderers.base:BaseRenderer"
_DETOKENIZER = "vllm.v1.engine.detokenizer:FastIncrementalDetokenizer"
_OUTPUTS = "vllm.v1.engine.output_processor:OutputProcessor"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_BLOCKS = "vllm.v1.core.kv_cache_manager:KVCacheManager"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_ATTENTION = "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl"

_RENDER, _MESSAGES, _TOKENIZE = "render request", "render messages", "tokenize"
_INPUTS, _ADD, _OUTPUT, _SCHEDULE = (
    "process_inputs",
    "output_processor add_request",
    "process_outputs",
    "schedule",
)

STAGES = (
    Stage("body json", API, "starlette.requests:Request.json"),
    Stage("solve_dependencies (pydantic)", API, "fastapi.routing:solve_dependencies"),
    Stage(_RENDER, API, f"{_CHAT}.render_chat_request"),
    Stage(_MESSAGES, API, f"{_RENDERER}.render_messages_async", _RENDER),
    Stage("parse_chat_messages", API, "vllm.renderers.hf:parse_chat_messages_async", _MESSAGES),
    Stage("chat_template", API, "vllm.renderers.hf:safe_apply_chat_template", _MESSAGES),
    Stage(_TOKENIZE, API, f"{_RENDERER}._tokenize_singleton_prompt_async", _RENDER),
    Stage("tokenizer itself", API, f"{_RENDERER}._tokenize_prompt", _TOKENIZE),
    Stage(_INPUTS, API, "vllm.v1.engine.input_processor:InputProcessor.process_inputs"),
    Stage("validate_token_ids", API, f"{_RENDERER}.validate_token_ids", _INPUTS),
    Stage(_ADD, API, f"{_OUTPUTS}.add_request"),
    Stage("detokenizer init", API, f"{_DETOKENIZER}.__init__", _ADD),
    Stage("send_input", API, "vllm.v1.engine.core_client:AsyncMPClient._send_input"),
    Stage("preprocess_add_request", CORE, "vllm.v1.engine.core:EngineCore.preprocess_add_request"),
    Stage(_SCHEDULE, CORE, f"{_SCHEDULER}.schedule"),
    Stage("get_computed_blocks", CORE, f"{_BLOCKS}.get_computed_blocks", _SCHEDULE),
    Stage("allocate_slots", CORE, f"{_BLOCKS}.allocate_slots", _SCHEDULE),
    Stage(EXECUTE, WORKER, "vllm.v1.worker.worker_base:WorkerWrapperBase.execute_model"),
    Stage("_update_states", WORKER, f"{_RUNNER}._update_states", EXECUTE),
    Stage("_prepare_inputs", WORKER, f"{_RUNNER}._prepare_inputs", EXECUTE),
    Stage(ATTENTION, WORKER, f"{_ATTENTION}.forward", EXECUTE),
    Stage(UPDATE, CORE, f"{_SCHEDULER}.update_from_output"),
    Stage(_OUTPUT, API, f"{_OUTPUTS}.process_outputs"),
    Stage("detokenizer first step", API, f"{_DETOKENIZER}._protected_step", _OUTPUT),
    Stage("free (behind the answer)", CORE, f"{_BLOCKS}.free", runs_last=True),
)


def depth(stage: Stage) -> int:
    """How many stages this one is a part of."""
    parents = {each.name: each.inside for each in STAGES}
    number, name = 0, stage.inside
    while name:
        number, name = number + 1, parents[name]
    return number


class Record(NamedTuple):
    """One call of a stage."""

    stage: str
    start_s: float
    end_s: float


class Window(NamedTuple):
    """One request as its client saw it."""

    sent_s: float
    first_s: float
    end_s: float
    num_answer_tokens: int


def read_records(folder: Path) -> tuple[list[Record], list[str]]:
    """All records of a server's processes in the order of their start, and what is missing."""
    records: list[Record] = []
    missing: list[str] = []
    for path in sorted(folder.glob("*.times")):
        found, lacking = parse_records(path.read_text().splitlines())
        records += found
        missing += lacking
    return sorted(records, key=attrgetter("start_s")), missing


def parse_records(lines: Iterable[str]) -> tuple[list[Record], list[str]]:
    """Records, and the targets that a process did not find; a half-written line is left out."""
    records: list[Record] = []
    missing: list[str] = []
    for line in lines:
        match line.split("\t"):
            case [kind, what] if kind == MISSING:
                missing.append(what)
            case [name, start, end]:
                records.append(Record(name, float(start), float(end)))
    return records, missing


def stage_times(records: Sequence[Record], window: Window) -> dict[str, float]:
    """Milliseconds that each stage took up to the first token; calls inside each other count once.

    While the first token is still on its way to the client, the engine computes the next ones:
    of its stages only those of the prompt count.
    """
    seen = _between(records, window.sent_s, window.end_s)
    ends = {API: window.first_s, **_prompt_ends(seen, window)}
    times: dict[str, float] = {}
    covered: list[tuple[float, float]] = []
    for stage in STAGES:
        until = window.end_s if stage.runs_last else ends[stage.process]
        spans = [
            (record.start_s, min(record.end_s, until))
            for record in seen
            if record.stage == stage.name and record.start_s < until
        ]
        times[stage.name] = _length(spans) * 1000
        covered += [] if stage.runs_last else spans
    within = [(start, min(end, window.first_s)) for start, end in covered]
    times[OUTSIDE] = (window.first_s - window.sent_s - _length(within)) * 1000
    return times


def longest(stage: str, records: Sequence[Record], window: Window) -> float:
    """Milliseconds of the longest record of a stage that began in a request."""
    seen = _between(records, window.sent_s, window.end_s)
    found = [record for record in seen if record.stage == stage]
    return max(((record.end_s - record.start_s) * 1000 for record in found), default=0.0)


def _prompt_ends(seen: Sequence[Record], window: Window) -> dict[str, float]:
    """When the worker, and the core, were done with the prompt and its first token.

    Each later token takes one step, so the steps before those are the prompt's. A step without
    attention computes nothing: the engine makes one to say that a request has ended.
    """
    attention = [record.start_s for record in seen if record.stage == ATTENTION]
    steps = [
        record
        for record in seen
        if record.stage == EXECUTE and _has_any(attention, record.start_s, record.end_s)
    ]
    number = len(steps) - (window.num_answer_tokens - 1)
    worker = steps[number - 1].end_s if 0 < number <= len(steps) else window.first_s
    updates = [r.end_s for r in seen if r.stage == UPDATE and r.start_s >= worker]
    return {WORKER: worker, CORE: min(updates, default=window.first_s)}


def _has_any(starts: Sequence[float], low: float, high: float) -> bool:
    place = bisect_left(starts, low)
    return place < len(starts) and starts[place] < high


def _between(records: Sequence[Record], low: float, high: float) -> Sequence[Record]:
    """The records that start in this time; they are sorted by their start."""
    start = attrgetter("start_s")
    return records[bisect_left(records, low, key=start) : bisect_left(records, high, key=start)]


def _length(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of the spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
