# SPDX-License-Identifier: Apache-2.0
"""What the order of idle sessions costs the scheduler's thread, per event.

    python -m benchmarks.policy.bench_queue [--sessions 1000,10000]

Sessions of one tenant come and go in random order over simulated time, with gaps as recorded.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TypeVar

from vllm_stateful.schedule.fairness import FairQueue
from vllm_stateful.schedule.gaps import Wait, WaitKind
from vllm_stateful.schedule.retention import Worth
from vllm_stateful.schedule.waits import WaitBook

NUM_EVENTS = 5000
T = TypeVar("T")


class Timer:
    """Microseconds of each call, by name."""

    def __init__(self) -> None:
        self.times_us: dict[str, list[float]] = {}

    def call(self, name: str, function: Callable[..., T], *arguments: object) -> T:
        start = time.perf_counter()
        result = function(*arguments)
        self.times_us.setdefault(name, []).append((time.perf_counter() - start) * 1e6)
        return result


def measure(num_sessions: int) -> Timer:
    """So many idle sessions; then each event ends a turn, and one in three demotes a session."""
    chance, timer = random.Random(0), Timer()
    book, queue = WaitBook(max_sessions=2 * num_sessions), FairQueue[int]()
    now_s = 0.0

    def end_turn(session: int, now_s: float) -> None:
        wait = Wait(chance.choice((WaitKind.TOOL, WaitKind.USER)), f"tool-{session % 20}")
        forecast = book.began(session, "tenant", wait, now_s)
        queue.add(
            session,
            tenant="tenant",
            num_blocks=100,
            worth=Worth.LIVE,
            forecast=forecast,
            now_s=now_s,
        )

    for session in range(num_sessions):
        now_s += 0.05
        end_turn(session, now_s)
    for number in range(NUM_EVENTS):
        now_s += 0.05
        session = chance.randrange(num_sessions)
        timer.call("a turn arrives", book.came_back, session, now_s)
        queue.discard(session)
        timer.call("a turn ends", end_turn, session, now_s)
        if number % 3 == 0:
            victim = timer.call("a victim is chosen", queue.next_victim, now_s)
            assert victim is not None
            queue.discard(victim)
            end_turn(victim, now_s)
        timer.call("expired sessions are looked for", queue.expired, now_s - 1e6, now_s)
    return timer


def main(arguments: Sequence[str]) -> int:
    """Print median and largest of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sessions", default="1000,10000")
    args = parser.parse_args(arguments)
    print("sessions  event                            median us  99th  largest")
    for num_sessions in map(int, args.sessions.split(",")):
        for name, times_us in measure(num_sessions).times_us.items():
            ordered = sorted(times_us)
            tail = ordered[int(0.99 * len(ordered))]
            figures = f"{median(ordered):9.1f} {tail:5.0f} {ordered[-1]:8.0f}"
            print(f"{num_sessions:8d}  {name:32s} {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
