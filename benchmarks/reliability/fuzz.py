# SPDX-License-Identifier: Apache-2.0
"""The same requests, valid and broken, to stock vLLM and to the plugin: are the answers the same?

    python -m benchmarks.reliability.fuzz [--seed N] [--cases 400] [--every 1] [--verified 0]
        [--out DIR]

Both servers run the tiny model in float32. A table of handwritten cases comes first, then random
faults in valid requests. What differs is printed and written to DIR/differences.jsonl; the exit
status is 1 then. Needs `make model`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from benchmarks.reliability.fuzz_answers import ALLOWED, ALLOWED_CASES, Case
from benchmarks.reliability.fuzz_cases import handwritten
from benchmarks.reliability.fuzz_mutate import mutated, shrunk
from benchmarks.reliability.fuzz_sides import MODEL, Difference, Sides, running_sides

SHOWN_CHARS, SHOWN_PLACES = 600, 8


def differences(sides: Sides, cases: Iterable[Case]) -> Iterator[Difference]:
    """What the sides answer otherwise. Every second case is not answered from memory."""
    for number, case in enumerate(cases):
        found = sides.play(case, is_cached=number % 2 == 0)
        if found is not None:
            yield found


def smaller(sides: Sides, case: Case, found: Difference) -> Difference:
    """A difference of a random case, without what it does not need."""
    if not sides.differs(case):
        return found  # it takes what came before
    least = shrunk(case, sides.differs)
    again = sides.play(replace(least, name=f"{least.name}, shrunk"))
    return again or found


def main() -> int:
    """0 without a difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=400, help="random ones, after the table")
    parser.add_argument("--every", type=int, default=1, help="every how many of the table")
    parser.add_argument("--verified", type=float, default=0, help="--stateful-verify-tokens")
    parser.add_argument("--out", type=Path, default=Path("out") / "fuzz")
    asked = parser.parse_args()
    if not (MODEL / "config.json").exists():
        sys.exit("the tiny model is not built: run `make model`")
    for name, reason in ALLOWED.items():
        print(f"may differ: {name}: {reason}")
    for reason in ALLOWED_CASES:
        print(f"may differ: {reason}")
    with running_sides(asked.out, asked.verified) as sides:
        table, drawn = handwritten()[:: asked.every], mutated(asked.seed, asked.cases)
        return _play(sides, table, drawn, asked.out / "differences.jsonl")


def _play(sides: Sides, table: list[Case], drawn: list[Case], report: Path) -> int:
    count = 0
    started = time.monotonic()
    with report.open("w") as lines:
        for found in differences(sides, table):
            count += 1
            _say(found, lines)
        print(f"{len(table)} handwritten cases in {time.monotonic() - started:.0f} s")
        by_name = {case.name: case for case in drawn}
        for found in differences(sides, drawn):
            count += 1
            _say(smaller(sides, by_name[found.name], found), lines)
    faults = sides.faults_in_log()
    for line in faults:
        print(f"log of the plugin: {line}")
    for name in sides.unstable:
        print(f"not compared, stock vLLM itself answers this and that: {name!a}")
    seconds = time.monotonic() - started
    print(f"{len(drawn)} random cases; {sides.num_requests} requests to each side")
    print(f"{count} differences, {len(faults)} faults in the log, {seconds:.0f} s: {report}")
    return 1 if count or faults else 0


def _say(found: Difference, lines: TextIO) -> None:
    made = found.as_json()
    print(json.dumps(made), file=lines, flush=True)
    print(f"DIFFERENCE: {found.name!a}, turn {found.turn}: {made['path']}")
    for key in ("headers", "body"):
        print(f"  {key}: {json.dumps(made[key])[:SHOWN_CHARS]}")
    for place in made["places"][:SHOWN_PLACES]:
        print(f"  {place}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
