# SPDX-License-Identifier: Apache-2.0
"""Show the Grafana dashboard a real Prometheus, and say which panels stay empty.

    python -m benchmarks.demo.dashboard [--only agents,off] [--out FILE]

It starts Prometheus and, one after the other, servers with the plugin, plays a short load on each,
runs `promtool check metrics` on what they export, and asks Prometheus every query of every panel.
Exit status: 0, or 1 where a panel is empty or promtool finds fault with a metric of the plugin.
"""

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from benchmarks.demo import machine
from benchmarks.demo.dashboard.panels import Shown, read_panels, shown
from benchmarks.demo.dashboard.prometheus import Prometheus, check_metrics, missing_programs
from benchmarks.demo.dashboard.servers import Kind, kinds
from benchmarks.demo.servers import Server, ServerFailedError
from benchmarks.models import ROOT
from benchmarks.ports import free_port

OUT = ROOT / "benchmarks" / "demo" / "results" / "dashboard.json"
LOGS = Path("out/dashboard")
OURS = "vllm_stateful_"
SETTLE_S = 4.0
"""Seconds until everything was polled from the engine and scraped."""


ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""Of the servers: where `benchmarks.reliability.host_tier` is, and that the worker of a CPU runs in
its engine's process. Only there the steps of attention are counted."""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo.dashboard")
    parser.add_argument("--only", help="these servers, comma-separated (all)")
    parser.add_argument("--out", type=Path, default=OUT, help="the result (%(default)s)")
    arguments = parser.parse_args(words)
    names = [kind.name for kind in kinds(LOGS)]
    arguments.only = names if arguments.only is None else arguments.only.split(",")
    if unknown := set(arguments.only) - set(names):
        parser.error(f"--only: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return arguments


def play(kind: Kind, prometheus: Prometheus) -> list[str]:
    """Start one server, play its load, and return what promtool finds in its metrics."""
    say(f"{kind.name}: starting")
    log = LOGS / f"{kind.name}.log"
    with Server(kind.name, kind.options(), log, kind.arguments, free_port()) as server:
        server.wait_until_ready(lambda: None)
        prometheus.scrape(server.url)
        time.sleep(SETTLE_S)
        began = time.monotonic()
        try:
            kind.play(server.url)
        except httpx.HTTPStatusError as error:
            raise ServerFailedError(
                f"{kind.name}: {error}\n{error.response.text[:2000]}"
            ) from error
        time.sleep(SETTLE_S)
        say(f"{kind.name}: played for {time.monotonic() - began:.0f} s")
        return check_metrics(httpx.get(f"{server.url}/metrics", timeout=30).text)


def measure(chosen: Sequence[str]) -> tuple[list[Shown], dict[str, list[str]]]:
    """What each panel showed, and what promtool found, by server."""
    found: dict[str, list[str]] = {}
    with Prometheus(LOGS / "prometheus") as prometheus:
        start = time.time()
        for kind in kinds(LOGS):
            if kind.name in chosen:
                found[kind.name] = play(kind, prometheus)
        end = time.time()
        panels = [
            shown(panel, [prometheus.over_time(query, start, end) for query in panel.queries])
            for panel in read_panels()
        ]
    return panels, found


def summary(panels: Sequence[Shown], found: dict[str, list[str]]) -> dict[str, Any]:
    """What is to be told of a run."""
    findings = {line for lines in found.values() for line in lines}
    others = Counter(line.split(" ", 1)[1] for line in findings if not line.startswith(OURS))
    return {
        "panels": len(panels),
        "empty": [panel.title for panel in panels if panel.is_empty],
        "only_zero": [panel.title for panel in panels if panel.is_flat],
        "queries_without_a_number": [each for panel in panels for each in panel.empty_queries],
        "promtool_on_metrics_of_the_plugin": sorted(
            line for line in findings if line.startswith(OURS)
        ),
        "promtool_on_metrics_of_vllm": dict(others.most_common()),
    }


def table(panels: Sequence[Shown]) -> str:
    """One line a panel."""
    lines = [f"{'panel':<50}{'series':>7}{'largest':>12}  only zero"]
    for panel in panels:
        largest = "-" if panel.largest is None else f"{panel.largest:.4g}"
        lines.append(
            f"{panel.title:<50}{panel.series:>7}{largest:>12}  {', '.join(panel.all_zero)}".rstrip()
        )
    return "\n".join(lines)


def say(text: str) -> None:
    """One line of progress."""
    print(text, flush=True)


def main() -> int:
    """Play, ask, print and write."""
    arguments = parse(sys.argv[1:])
    if missing := missing_programs():
        print(f"not on this machine: {', '.join(missing)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # stops the servers too
    os.environ |= ENVIRONMENT
    command = f"python -m benchmarks.demo.dashboard {shlex.join(sys.argv[1:])}".strip()
    about = machine.describe() | {"command": command}
    try:
        panels, found = measure(arguments.only)
    except ServerFailedError as error:
        print(error, file=sys.stderr)
        return 1
    told = summary(panels, found)
    say(f"\n{table(panels)}\n\n{json.dumps(told, indent=1)}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"about": about, "summary": told, "panels": [asdict(panel) for panel in panels]}
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    say(f"written: {arguments.out}")
    return 1 if told["empty"] or told["promtool_on_metrics_of_the_plugin"] else 0


if __name__ == "__main__":
    sys.exit(main())
