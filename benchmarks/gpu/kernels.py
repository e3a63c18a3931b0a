# SPDX-License-Identifier: Apache-2.0
"""Command A: are the kernels right on this device, and how fast are they?

    python -m benchmarks.gpu.kernels [--seconds 250] [--out DIR]
    python -m benchmarks.gpu.kernels --tables DIR

First all checks side by side, each a process with a limit of its own: 300 random steps of each
kernel against float64, and a few steps under each tool of compute-sanitizer. Then the benchmark,
alone. DIR has ``check.jsonl``, ``sanitize.jsonl`` and ``kernels.jsonl``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.limited import append_row, read_rows, run_limited
from benchmarks.kernels.report import table as times_table

KERNELS = ("mma", "wgmma", "fp8", "shared")
TOOLS = ("memcheck", "racecheck", "synccheck")
SANITIZED = ("mma", "wgmma", "fp8")
CASES, SANITIZED_CASES = 300, 3
CHECKS_S = 80  # at most, of the checks together
CHECK, SANITIZE, TIMES = "check.jsonl", "sanitize.jsonl", "kernels.jsonl"
MOST_FAILURES = 3  # shown of a kernel; the file has all


def checks(out: Path, seconds: float) -> None:
    """Every check side by side; what each came to is in the files."""
    module = [sys.executable, "-m", "benchmarks.gpu.check_kernels"]
    tasks = [
        (CHECK, {"kernel": kernel}, [*module, kernel, "--cases", str(CASES)])
        for kernel in ("opcheck", *KERNELS)
    ]
    sanitizer = shutil.which("compute-sanitizer")
    for tool in TOOLS:
        for kernel in SANITIZED:
            few = [*module, kernel, "--small", "--cases", str(SANITIZED_CASES)]
            command = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
            tasks.append((SANITIZE, {"tool": tool, "kernel": kernel}, [*command, *few]))

    def play(number: int) -> None:
        file, about, command = tasks[number]
        log = out / f"check_{number}.log"
        rows = out / (CHECK if file == CHECK else f"sanitized_{number}.jsonl")
        if command[0] != sys.executable and not sanitizer:
            problem = "compute-sanitizer is not here"
        else:
            problem = run_limited([*command, "--out", rows], seconds, log)
        append_row(out / file, about | {"ended": problem})
        log.unlink(missing_ok=True)  # its end stands in the row
        if file == SANITIZE:
            rows.unlink(missing_ok=True)

    with ThreadPoolExecutor(len(tasks)) as pool:
        list(pool.map(play, range(len(tasks))))


def checks_table(out: Path) -> tuple[str, bool]:
    """What the checks came to, and whether everything was right."""
    from benchmarks.gpu.check_kernels import is_right

    played = defaultdict(list)
    ended: dict[str, str] = {}
    for row in read_rows(out / CHECK):
        if "seed" in row:
            played[row["kernel"]].append(row)
        elif "ended" in row:
            ended[row["kernel"]] = row["ended"]
    lines = ["| check | right | worst error | |", "|---|---|---|---|"]
    is_good = True
    for kernel in ("opcheck", *KERNELS):
        rows = played[kernel]
        right = [row for row in rows if is_right(row)]
        worst = max((row.get("error", float("inf")) for row in rows), default=None)
        problem = " ".join(ended.get(kernel, "not ended").split())
        of_all = "" if kernel == "opcheck" else f"{len(right)} of {len(rows)}"
        error = "" if worst is None else f"{worst:.1e}"
        lines.append(f"| {kernel} | {of_all} | {error} | {problem[-200:]} |")
        failures = [row for row in rows if not is_right(row)][:MOST_FAILURES]
        lines += [f"| | | | {row} |" for row in failures]
        is_good &= not problem and len(right) == len(rows)
    for row in read_rows(out / SANITIZE):
        problem = " ".join(row["ended"].split())
        lines.append(f"| {row['tool']} {row['kernel']} | | | {problem[-200:] or 'no errors'} |")
        is_good &= not problem
    return "\n".join(lines), is_good


def show(out: Path) -> bool:
    """Print all tables of a folder; whether the checks were right."""
    checked, is_good = checks_table(out)
    print(checked)
    print(f"\n{times_table(read_rows(out / TIMES))}")
    return is_good


def device_name() -> str:
    """As the driver calls it."""
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if not shutil.which(asked[0]):
        return "no device"
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def main() -> int:
    """Check, measure, print; 1 where something is wrong or did not end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=250)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", default="agents,goals", help="of the benchmark (%(default)s)")
    parser.add_argument("--library", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--no-checks", action="store_true", help="only the benchmark")
    parser.add_argument("--tables", type=Path, help="print those of a folder, run nothing")
    args = parser.parse_args()
    if args.tables:
        show(args.tables)
        return 0
    until = time.monotonic() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["GPU_NAME"] = device_name()
    if not args.no_checks:
        checks(args.out, min(CHECKS_S, args.seconds / 2))
    command = [sys.executable, "-m", "benchmarks.kernels.bench_kernels", "--steps", args.steps]
    command += [part for each in args.library for part in ("--library", each)]
    left = until - time.monotonic()
    command += ["--seconds", f"{left - 10:.0f}", "--out", str(args.out / TIMES)]
    problem = run_limited(command, left, args.out / "bench.log")
    is_good = show(args.out)
    if problem:
        print(f"\nthe benchmark: {problem.splitlines()[0]}")
    return 0 if is_good and not problem else 1


if __name__ == "__main__":
    sys.exit(main())
