# SPDX-License-Identifier: Apache-2.0
"""Whose waiting turn is admitted next: by arrival against by service, in a simulated queue.

    python -m benchmarks.policy.bench_order [--programs 1000] [--seeds 3]

Programs (agent sessions) of very different lengths share one engine that runs so many turns at a
time, each at a fixed speed. A turn computes what is new in its prompt and generates an answer; then
its program waits for a tool and sends the next one. Nothing else is simulated: no batching effects,
no KV cache that is too small, no preemption. The order is the one that runs in the engine; a bound
of 0 s is first come, first served.
"""

import argparse
import heapq
import math
import random
import sys
from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

from vllm_stateful.schedule.service_order import MAX_WAIT_S, ServiceBook, ServiceOrder

NUM_SLOTS = 32
PREFILL_PER_S = 10_000.0
DECODE_PER_S = 60.0
BOUNDS_S = (0.0, 10.0, MAX_WAIT_S, math.inf)
LOADS = (0.9, 1.1, 1.3, 2.0)


class Step(NamedTuple):
    """One turn of a program."""

    num_prompt: int
    """Tokens that are new in the prompt."""
    num_output: int
    gap_s: float
    """What its tool takes, before the next turn."""

    @property
    def run_s(self) -> float:
        return self.num_prompt / PREFILL_PER_S + self.num_output / DECODE_PER_S


class Program(NamedTuple):
    """When it starts, and what it does then."""

    start_s: float
    steps: list[Step]

    @property
    def least_s(self) -> float:
        """How long it takes when it never waits."""
        return sum(step.run_s + step.gap_s for step in self.steps) - self.steps[-1].gap_s


class Figures(NamedTuple):
    """Of all programs of one simulation."""

    mean_s: float
    p99_s: float
    mean_slowdown: float
    p99_slowdown: float
    mean_wait_s: float
    longest_wait_s: float


def make_programs(chance: random.Random, num_programs: int, load: float) -> list[Program]:
    """Log-normal in turns, tokens and gaps; arrivals at random, at that share of the capacity."""

    def draw(median: float, spread: float, least: float, most: float) -> float:
        return min(most, max(least, chance.lognormvariate(math.log(median), spread)))

    threads = [
        [
            Step(
                num_prompt=int(draw(800, 1.2, 20, 30_000)),
                num_output=int(draw(150, 0.9, 10, 4000)),
                gap_s=draw(2, 1.2, 0, 300),
            )
            for _ in range(int(draw(6, 1.3, 1, 300)))
        ]
        for _ in range(num_programs)
    ]
    work_s = sum(step.run_s for steps in threads for step in steps)
    span_s = work_s / NUM_SLOTS / load
    starts = sorted(chance.uniform(0, span_s) for _ in threads)
    return [Program(start_s, steps) for start_s, steps in zip(starts, threads, strict=True)]


def simulate(programs: Sequence[Program], max_wait_s: float) -> Figures:
    """Play all programs to their ends."""
    book = ServiceBook()
    order: ServiceOrder[tuple[int, int]] = ServiceOrder(book, max_wait_s)
    events = [(program.start_s, number, 0, False) for number, program in enumerate(programs)]
    heapq.heapify(events)
    arrived: dict[tuple[int, int], float] = {}
    took_s = [0.0] * len(programs)
    waits_s: list[float] = []
    num_free = NUM_SLOTS
    while events:
        now_s, number, turn, has_ended = heapq.heappop(events)
        steps = programs[number].steps
        if has_ended:
            num_free += 1
            book.charge(number, num_output=steps[turn].num_output)
            if turn + 1 < len(steps):
                heapq.heappush(events, (now_s + steps[turn].gap_s, number, turn + 1, False))
            else:
                took_s[number] = now_s - programs[number].start_s
        else:
            arrived[number, turn] = now_s
            order.add((number, turn), number, now_s)
        while num_free and len(order):
            number, turn = order.pop(now_s)
            waits_s.append(now_s - arrived.pop((number, turn)))
            step = programs[number].steps[turn]
            book.charge(number, num_prompt=step.num_prompt)
            heapq.heappush(events, (now_s + step.run_s, number, turn, True))
            num_free -= 1
    return _figures(programs, took_s, waits_s)


def _figures(
    programs: Sequence[Program], took_s: Sequence[float], waits_s: Sequence[float]
) -> Figures:
    slowdowns = [took / program.least_s for took, program in zip(took_s, programs, strict=True)]
    return Figures(
        mean(took_s),
        _p99(took_s),
        mean(slowdowns),
        _p99(slowdowns),
        mean(waits_s),
        max(waits_s),
    )


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


def main(arguments: Sequence[str]) -> int:
    """Print a table; each figure is the mean over the seeds, the longest wait the largest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(arguments)
    print("load  order           program s: mean   p99  slowdown: mean  p99  wait s: mean  longest")
    for load in LOADS:
        played = [make_programs(random.Random(n), args.programs, load) for n in range(args.seeds)]
        for bound_s in BOUNDS_S:
            runs = [simulate(programs, bound_s) for programs in played]
            of = Figures(*(mean(column) for column in zip(*runs, strict=True)))
            longest_s = max(run.longest_wait_s for run in runs)
            name = f"served, {bound_s:3.0f} s" if bound_s else "arrival"
            print(
                f"{load:4.1f}  {name:14s} {of.mean_s:16.1f} {of.p99_s:5.0f} "
                f"{of.mean_slowdown:15.2f} {of.p99_slowdown:4.1f} "
                f"{of.mean_wait_s:13.2f} {longest_s:8.1f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
