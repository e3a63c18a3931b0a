# SPDX-License-Identifier: Apache-2.0
"""What idle sessions cost a step of vLLM's scheduler.

    python -m benchmarks.policy.bench_step [--sessions 10,10000]

vLLM's scheduler with the plugin, over the simulated worker of the tests: sessions end one turn each
and stay, then other requests decode. Timed is ``schedule`` in steps in which nothing arrives or
ends, and in those with a full pool, where each new block has to be given back by a session.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
BLOCK_SIZE, SESSION_TOKENS, NUM_RUNNING, NUM_STEPS = 16, 48, 8, 400


def engine_with(num_sessions: int, spare_blocks: int) -> Any:
    """A simulated engine with so many idle sessions and so many free blocks."""
    sys.path.insert(0, str(ROOT / "tests" / "adapters"))
    from simulated_engine import SimulatedEngine

    per_session = -(-SESSION_TOKENS // BLOCK_SIZE)
    num_blocks = num_sessions * per_session + spare_blocks + 1
    engine = SimulatedEngine(
        num_blocks=num_blocks, block_size=BLOCK_SIZE, max_num_seqs=NUM_RUNNING, max_batched=512
    )
    pins = engine.manager.store.pins
    pins.budget_blocks = num_blocks
    for number in range(num_sessions):
        prompt = [number % 97, number // 97, *range(SESSION_TOKENS - 2)]
        engine.add(f"turn-{number}", prompt, session_id=f"session-{number}", max_tokens=1)
        engine.run()
    assert engine.manager.store.num_sessions == num_sessions
    return engine


def measure(num_sessions: int, *, full: bool) -> list[float]:
    """Microseconds of ``schedule`` in each step."""
    needed = NUM_RUNNING * (-(-(NUM_STEPS + 16) // BLOCK_SIZE))
    engine = engine_with(num_sessions, 0 if full else needed)
    for number in range(NUM_RUNNING):
        prompt = [number, *range(200, 208)]
        engine.add(f"running-{number}", prompt, max_tokens=NUM_STEPS)
    engine.step()
    schedule, times_us = engine.scheduler.schedule, []

    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        output = schedule(*arguments, **options)
        times_us.append((time.perf_counter() - start) * 1e6)
        return output

    engine.scheduler.schedule = timed
    for _ in range(NUM_STEPS - 2):
        engine.step()
    return times_us


def main(arguments: Sequence[str]) -> int:
    """Print median, 99th percentile and largest of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sessions", default="50,1000,10000")
    args = parser.parse_args(arguments)
    print("sessions  pool             median us  99th  largest")
    for num_sessions in map(int, args.sessions.split(",")):
        for name, full in (("free blocks", False), ("full of sessions", True)):
            ordered = sorted(measure(num_sessions, full=full))
            tail = ordered[int(0.99 * (len(ordered) - 1))]
            figures = f"{median(ordered):9.1f} {tail:5.0f} {ordered[-1]:8.0f}"
            print(f"{num_sessions:8d}  {name:16s} {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
