# SPDX-License-Identifier: Apache-2.0
"""What a step and the end of a turn cost in the scheduler, stock and with the plugin.

    python -m benchmarks.families.step_cost [--turns N] [--rounds N]

No model: `modelless`. Conversations grow by a question and an answer each turn, and their turns end
one after the other. Scheduling is synchronous, so that the end of a turn is in one call. The sides
take turns, each with an engine of its own: stock, the plugin, and the plugin without the records of
turns (``--stateful-explain off``). Medians, in microseconds.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from benchmarks.families.modelless import Engine, Setting, Shape
from benchmarks.families.recorded_turns import STYLES, Text, text_of
from benchmarks.models import CACHE
from benchmarks.serving.tables import markdown, ratio
from vllm_stateful.config import process_config

SHAPES = {"1 full/16": Shape(), "3 state + 1 full/528": Shape(states=3, block=528)}
LOADS = ((8, 20_000), (1, 150_000))
"""Requests that run, and tokens of each."""
ADDED, ANSWER, STAGGER = 60, 60, 5
MOST_LOAD = 2.5
PLAIN_IDS = 1000, 40_000
"""Of tokens that are no markers."""

STOCK, PLUGIN, UNEXPLAINED = SIDES = ("stock", "plugin", "unexplained")
ADMIT, STEP, UPDATE, END = "admission", "schedule()", "update_from_output()", "end of a turn"
Times = Mapping[str, list[float]]


def measure(shape: Shape, text: Text, num: int, length: int, turns: int, side: str) -> Times:
    """Seconds of each call, by what it did. The first turns, which compute all, are left out."""
    os.environ["VLLM_STATEFUL_EXPLAIN"] = "off" if side == UNEXPLAINED else "places"
    process_config.cache_clear()
    random = Random(0)
    num_blocks = 4 * num * (1 + shape.states) * (length // shape.block + 16)
    engine = Engine(
        shape,
        num_blocks,
        Setting(),
        is_stateful=side != STOCK,
        is_async=False,
        tokenizer=text,
        max_num_seqs=num,
    )
    told = [random.choices(range(*PLAIN_IDS), k=length) for _ in range(num)]
    taken = defaultdict[str, list[float]](list)
    for turn in range(turns + 1):
        for number, tokens in enumerate(told):
            answer = random.choices(range(*PLAIN_IDS), k=ANSWER + STAGGER * number)
            answer.append(text.ends[0])
            engine.add(f"{number}-{turn}", tokens, answer, text.ends)
            tokens += answer + random.choices(range(*PLAIN_IDS), k=ADDED)
        gc.collect()
        found = _timed(engine.scheduler, engine, num)
        for name, seconds in found.items() if turn else ():
            taken[name] += seconds
    return taken


def _timed(scheduler: Any, engine: Engine, num: int) -> Times:
    """Run what was added. Steps count where all requests run and decode."""
    taken = defaultdict[str, list[float]](list)
    while scheduler.has_requests():
        started = time.perf_counter()
        step = scheduler.schedule()
        scheduled = time.perf_counter()
        output = engine.execute(step)
        sampled = time.perf_counter()
        num_running = len(scheduler.requests)
        scheduler.update_from_output(step, output)
        ended = time.perf_counter()
        if step.scheduled_new_reqs:
            taken[ADMIT].append((scheduled - started) / len(step.scheduled_new_reqs))
        elif step.total_num_scheduled_tokens == num:
            taken[STEP].append(scheduled - started)
        if len(scheduler.requests) < num_running:
            taken[END].append(ended - sampled)
        elif step.total_num_scheduled_tokens == num:
            taken[UPDATE].append(ended - sampled)
    return taken


def rows(text: Text, turns: int, rounds: int) -> list[list[str]]:
    made = []
    for name, shape in SHAPES.items():
        for num, length in LOADS:
            taken = {side: defaultdict[str, list[float]](list) for side in SIDES}
            for _ in range(rounds):
                for side, found in taken.items():
                    times = measure(shape, text, num, length, turns, side)
                    for what, seconds in times.items():
                        found[what] += seconds
            for what in (STEP, UPDATE, END, ADMIT):
                stock, plugin, bare = (1e6 * median(taken[side][what]) for side in SIDES)
                figures = [f"{stock:.0f}", f"{plugin:.0f}", ratio(plugin, stock), f"{bare:.0f}"]
                count = str(len(taken[PLUGIN][what]))
                made.append([name, f"{num} x {length}", what, *figures, count])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.families.step_cost", description=__doc__)
    parser.add_argument("--model", type=Path, default=CACHE / "smollm2-135m", help="its tokenizer")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    before = os.getloadavg()[0]
    text = text_of(STYLES["qwen3-thinking"], options.model)
    head = ("groups", "running", "what", "stock us", "plugin us", "plugin / stock")
    head += ("without records us", "samples")
    print(markdown(head, rows(text, options.turns, options.rounds)))
    after = os.getloadavg()[0]
    noisy = "" if max(before, after) < MOST_LOAD else ": noisy, do not record"
    print(f"\nload {before:.1f} before, {after:.1f} after{noisy}")


if __name__ == "__main__":
    main()
