# SPDX-License-Identifier: Apache-2.0
"""Delta append attention against what vLLM has, on one device, the append included on all sides.

    python -m benchmarks.kernels.bench_kernels [--seconds 150] [--steps agents,goals] [--out FILE]
    python -m benchmarks.kernels.bench_kernels --tables FILE

Each side is a process of its own, which captures its calls into a CUDA graph over several copies of
the cache, more than the second level cache holds. The graphs are replayed turn about, one process
at a time. First every side is compared with float64: a wrong one gets no time. A side that fails,
hangs or ends the process is named with the reason and the others go on; rows are in the file as
soon as they exist.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.demo import machine
from benchmarks.gpu.limited import append_row, read_rows
from benchmarks.gpu.workers import Worker, WorkerError
from benchmarks.kernels import sides, steps
from benchmarks.kernels.report import table
from benchmarks.kernels.steps import Regime
from benchmarks.kernels.worker import ORACLE

MOST_ERROR = 4e-3
MOST_ERROR_OF_PEERS = 2e-2
MOST_ERROR_OF_FP8_PEERS = 2e-1  # they multiply in fp8 too
START_S = 60  # of a worker: imports, the device's context
PREPARE_S = 25  # of a step
REPLAY_S = 10
WITH = " with "

Row = dict[str, Any]


def most_error(side: str, regime: Regime) -> float:
    """The relative error above which a side's result is wrong."""
    if sides.is_ours(side):
        return MOST_ERROR
    return MOST_ERROR_OF_FP8_PEERS if regime.fp8 else MOST_ERROR_OF_PEERS


class Comparison:
    """Workers for all sides, started when they are first needed, and again after a failure.

    Args:
        scratch: For what must come out, and for what the workers print.
        libraries: Our kernels built otherwise, by the name that follows ``with`` in a side's.
        module: Where `make_call` is.
    """

    def __init__(self, scratch: Path, libraries: Mapping[str, Path], module: str) -> None:
        self._scratch, self._libraries, self._module = scratch, libraries, module
        self._workers: dict[str, Worker] = {}

    def start(self, names: Iterable[str]) -> None:
        """Start those that are not there; their imports overlap."""
        for name in names:
            if name not in self._workers:
                self._workers[name] = self._started(name)

    def _started(self, name: str) -> Worker:
        side, _, library = name.partition(WITH)
        command = [sys.executable, "-m", "benchmarks.kernels.worker", side, "--sides", self._module]
        if library:
            command += ["--library", str(self._libraries[library])]
        log = self._scratch / f"{name.replace(' ', '_').replace(',', '')}.log"
        return Worker(command, log)

    def measure(self, regime: Regime, names: list[str], rounds: int, until: float) -> list[Row]:
        """One row for each side of a step, with its time or with the reason why it has none."""
        expected = self._scratch / "expected.pt"
        began = time.monotonic()
        self.start([ORACLE, *names])
        limit = min(until, began + START_S + PREPARE_S)
        rows: dict[str, Row] = {name: {"step": regime.name, "side": name} for name in names}
        try:
            self._workers[ORACLE].ask(do="expect", step=regime.name, expected=str(expected))
            self._workers[ORACLE].answer(limit)
        except WorkerError as error:
            self._drop(ORACLE)
            return [row | {"failed": f"float64: {error}"} for row in rows.values()]
        for name in names:
            self._workers[name].ask(
                do="prepare",
                step=regime.name,
                expected=str(expected),
                most_error=most_error(name.partition(WITH)[0], regime),
                appends=name != sides.SDPA,
            )
        ready = [name for name in names if self._is_right(name, rows[name], regime, limit)]
        times: dict[str, list[float]] = {name: [] for name in ready}
        for turn in range(rounds + 1):
            for name in list(times):
                try:
                    self._workers[name].ask(do="time")
                    answer = self._workers[name].answer(min(until, time.monotonic() + REPLAY_S))
                except WorkerError as error:
                    rows[name]["failed"] = str(error)
                    self._drop(name)
                    del times[name]
                    continue
                times[name] += [answer["us"]] if turn else []  # the first one warms up
        floor = regime.floor_s() * 1e6
        for name, samples in times.items():
            us = statistics.median(samples)
            rows[name] |= {"us": us, "samples": samples, "of_floor": floor / us, "floor_us": floor}
        return list(rows.values())

    def _is_right(self, name: str, row: Row, regime: Regime, until: float) -> bool:
        try:
            row["error"] = self._workers[name].answer(until)["error"]
        except WorkerError as error:
            row["failed"] = str(error)
            self._drop(name)
            return False
        if not row["error"] <= most_error(name.partition(WITH)[0], regime):
            row["wrong"] = True
            return False
        return True

    def _drop(self, name: str) -> None:
        """A CUDA error stays with its process: the next step gets another one."""
        self._workers.pop(name).close()

    def close(self) -> None:
        """End all workers."""
        for name in list(self._workers):
            self._drop(name)


def chosen_steps(asked: str, libraries: Mapping[str, Path]) -> list[tuple[Regime, list[str]]]:
    """The steps of ``agents,goals,sweeps,cpu``, and the sides of each."""
    found: list[tuple[Regime, list[str]]] = []
    for name in asked.split(","):
        if name == "sweeps":
            found += [
                (regime, [each for each in compared if _is_built(each, libraries)])
                for regime, compared in steps.of_sweeps()
            ]
            continue
        known = {"agents": steps.of_agents, "goals": steps.of_goals, "cpu": steps.of_a_cpu}
        found += [(regime, sides.names(regime)) for regime in known[name]()]
    return found


def _is_built(side: str, libraries: Mapping[str, Path]) -> bool:
    _, _, library = side.partition(WITH)
    return not library or library in libraries


def main() -> int:
    """Measure, write row by row, print the table; 1 where one of ours is wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no step after them")
    parser.add_argument("--steps", default="agents,goals", help="and sweeps, cpu (%(default)s)")
    parser.add_argument("--only", help="these sides alone, by name, with ; between them")
    parser.add_argument("--sides", default="benchmarks.kernels.sides", help=argparse.SUPPRESS)
    parser.add_argument(
        "--library",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="our kernels built otherwise, for sides that end in 'with NAME'",
    )
    parser.add_argument("--out", type=Path, default=Path("out/kernels.jsonl"))
    parser.add_argument("--tables", type=Path, help="print the table of a file, measure nothing")
    args = parser.parse_args()
    if args.tables:
        print(table(read_rows(args.tables)))
        return 0
    until = time.monotonic() + args.seconds
    libraries = {
        name: Path(file) for name, _, file in (each.partition("=") for each in args.library)
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = machine.describe() | {"device": os.environ.get("GPU_NAME", "unknown")}
    append_row(args.out, {"about": about})
    is_bad = False
    with tempfile.TemporaryDirectory() as scratch:
        comparison = Comparison(Path(scratch), libraries, args.sides)
        try:
            for regime, names in chosen_steps(args.steps, libraries):
                names = args.only.split(";") if args.only else names
                if time.monotonic() > until:
                    append_row(args.out, {"step": regime.name, "skipped": "time was up"})
                    continue
                for row in comparison.measure(regime, names, args.rounds, until):
                    append_row(args.out, row)
                    is_ours = sides.is_ours(row["side"].partition(WITH)[0])
                    is_bad |= is_ours and ("wrong" in row or "failed" in row)
        finally:
            comparison.close()
    print(table(read_rows(args.out)))
    return 1 if is_bad else 0


if __name__ == "__main__":
    sys.exit(main())
