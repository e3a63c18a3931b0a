# SPDX-License-Identifier: Apache-2.0
"""Soak: a small server under a long, mixed, hostile load; every answer may be checked by stock.

    python -m benchmarks.reliability.soak [--minutes 10] [--seed N] [--out DIR]
        [--lora none|fixed|swap]

One server with the plugin, a KV cache too small for its load, drafts, and a stock server
that answers a share of the same requests one by one. Nothing may be wrong, nothing may take longer
than a minute, and when all sessions are closed nothing may be held. DIR gets ``report.json``,
``report.md``, the logs, and ``wrong.jsonl`` and ``stuck.jsonl`` where there is something to tell.

With ``--lora fixed`` all talk to one of two adapters. With ``--lora swap`` there is one API server,
as vLLM asks for, and another adapter is loaded under the same name again and again. Requests in
flight while an adapter changes are not played: in stock vLLM, too, they get an answer of both.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.models import tiny
from benchmarks.reliability.soak_load import Soak, Tally
from benchmarks.reliability.soak_servers import Options, SoakServer, both
from benchmarks.reliability.soak_watch import Watch, left_over, metrics, told
from benchmarks.serving.servers import PLUGIN

MOST_SLOPE = 1.0
SLOPE_FROM_S = 300.0


@dataclass
class Report:
    """What a run found.

    Attributes:
        left: metrics that are not zero after all sessions were closed.
        slopes: MiB per minute by process, in the last half.
        ends: MiB by process, at the first and the last sample.
        rows: all samples: seconds since the start, and MiB by process.
    """

    seconds: float
    seed: int
    counts: dict[str, int]
    problems: dict[str, int]
    wrong: list[dict[str, Any]]
    stuck: list[dict[str, Any]]
    left: dict[str, float]
    bad_entries: list[str]
    slopes: dict[str, float]
    ends: dict[str, tuple[float, float]]
    span_s: float
    latency_s: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)
    rows: list[tuple[float, dict[str, float]]] = field(default_factory=list)

    def faults(self) -> list[str]:
        """Why this run failed; empty: it did not."""
        found = []
        for name in ("wrong", "stuck", "left", "bad_entries", "problems"):
            if getattr(self, name):
                found.append(f"{name}: {len(getattr(self, name))}")
        if self.span_s > SLOPE_FROM_S:
            for name, slope in self.slopes.items():
                if name.startswith(PLUGIN) and "bytes" not in name and slope > MOST_SLOPE:
                    found.append(f"{name} grows by {slope:.2f} MiB/min")
        return found

    def markdown(self) -> str:
        """For people."""
        faults = "; ".join(self.faults()) or "nothing found"
        lines = [f"# Soak of {self.seconds:.0f} s, seed {self.seed}: {faults}", ""]
        lines += ["| what | number |", "|---|---:|"]
        lines += [f"| {name} | {number} |" for name, number in sorted(self.counts.items())]
        lines += [f"| wrong | {len(self.wrong)} |", f"| stuck | {len(self.stuck)} |"]
        lines += [f"| latency {name} | {s:.2f} s |" for name, s in self.latency_s.items()]
        lines += [
            "",
            "| process | first MiB | last MiB | MiB/min, last half |",
            "|---|---:|---:|---:|",
        ]
        for name, slope in self.slopes.items():
            first, last = self.ends.get(name, (0.0, 0.0))
            lines.append(f"| {name} | {first:.1f} | {last:.1f} | {slope:+.2f} |")
        lines += ["", "| metric | at the end |", "|---|---:|"]
        lines += [f"| `{name}` | {value:g} |" for name, value in sorted(self.metrics.items())]
        for title, rows in (("Left", self.left), ("Problems", self.problems)):
            if rows:
                lines += [
                    "",
                    f"{title}:",
                    *(f"- {name}: {value:g}" for name, value in rows.items()),
                ]
        for row in self.wrong[:10]:
            lines += ["", f"Wrong at {row['at_s']} s: {row['what']}"]
        if self.bad_entries:
            lines += ["", "In the log:"]
            lines += [f"    {line}" for e in self.bad_entries[:5] for line in e.splitlines()[-6:]]
        return "\n".join(lines) + "\n"


def soak(*, seconds: float, seed: int, folder: Path, options: Options) -> Report:
    """One run, with servers of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("wrong.jsonl", "stuck.jsonl"):
        (folder / name).unlink(missing_ok=True)
    with both(options, folder) as servers:
        return asyncio.run(_soak(servers, options, seconds, seed, folder))


async def _soak(
    servers: dict[str, SoakServer], options: Options, seconds: float, seed: int, folder: Path
) -> Report:
    load = Soak(servers, options, seconds=seconds, seed=seed, folder=folder)
    watch = Watch(servers)
    began = time.monotonic()
    watching = asyncio.create_task(watch.run())
    try:
        await load.play()
        took = time.monotonic() - began
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    await asyncio.sleep(2)  # the metrics are read once a second
    found = await metrics(servers[PLUGIN].url)
    await load.close_sessions()
    left = await left_over(servers[PLUGIN].url)
    if servers[PLUGIN].exit_status() is not None:
        left["exit status"] = servers[PLUGIN].exit_status() or 0
    return _report(load.tally, watch, took, seed, left, servers[PLUGIN].bad_entries(), told(found))


def _report(
    tally: Tally,
    watch: Watch,
    took: float,
    seed: int,
    left: dict[str, float],
    bad_entries: list[str],
    found: dict[str, float],
) -> Report:
    latency = sorted(tally.seconds) or [0.0]
    shares = {"median": 0.5, "99 %": 0.99, "most": 1.0}
    first, last = (watch.rows[0][1], watch.rows[-1][1]) if watch.rows else ({}, {})
    return Report(
        seconds=took,
        seed=seed,
        counts=dict(tally.counts),
        problems=dict(tally.problems),
        wrong=tally.wrong,
        stuck=tally.stuck,
        left=left,
        bad_entries=bad_entries,
        slopes=watch.slopes(),
        ends={name: (first.get(name, 0.0), value) for name, value in last.items()},
        span_s=watch.span(),
        latency_s={
            name: latency[min(int(share * len(latency)), len(latency) - 1)]
            for name, share in shares.items()
        },
        metrics=found,
        rows=watch.rows,
    )


def write(report: Report, folder: Path) -> None:
    """``report.json`` and ``report.md``."""
    (folder / "report.json").write_text(json.dumps(report.__dict__, indent=1) + "\n")
    (folder / "report.md").write_text(report.markdown())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/soak"))
    parser.add_argument("--lora", choices=("none", "fixed", "swap"), default="none")
    parser.add_argument("--no-drafts", action="store_true")
    args = parser.parse_args()
    tiny.ensure_tiny()
    options = Options(lora=args.lora, has_drafts=not args.no_drafts)
    report = soak(seconds=60 * args.minutes, seed=args.seed, folder=args.out, options=options)
    write(report, args.out)
    print(report.markdown())
    sys.exit(1 if report.faults() else 0)


if __name__ == "__main__":
    main()
