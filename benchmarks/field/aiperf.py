# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's AIPerf: synthesized agentic coding sessions, against stock vLLM and the plugin.

    python -m benchmarks.field.aiperf --tool PATH/TO/aiperf
        [--sessions 32] [--turns 4] [--scale 0.25] [--max-answer-tokens 64]
        [--concurrency 1 8 32] [--cache 0.4 1.0] [--rounds 2] [--unnamed]
        [--model FOLDER] [--serve ARGUMENT ...] [--out FILE]

The tool (package ``aiperf``, Python 3.12) makes the sessions (``aiperf synthesize agentic-code``,
seeded, once) and plays them (``aiperf profile``). Two servers run: stock vLLM with prefix caching,
and the plugin. For each size of the KV cache both are started anew. For each number of sessions at
once and each round, the tool runs against one and then the other, and the next time in the other
order.

- A turn is sent as soon as the turn before is answered (``--inter-turn-delay-cap-seconds 0``), with
  the server's own answers as history, greedy.
- Every run begins cold. The server's KV is reset, and the words of the sessions are others for each
  run of a server (``--random-seed``), as the plugin also remembers texts. Both sides get the same.
- The tool sends no warmup requests, as it does so only if asked to. That the server finished as
  many requests as the dataset has turns is checked. Before its first run each server answers one
  long prompt, and then its KV is reset.
- The tool gives each session an id. It sends it in ``X-Correlation-ID``, which the plugin does not
  read, or in a header of choice. Here that is ``X-Session-ID``, which both sides read. With
  ``--unnamed`` it is ``X-Correlation-ID``: the plugin then recognizes sessions by their content.
- The tool takes counts of tokens from the server (``--use-server-token-count``), so it does not
  tokenize on the cores that the servers use. It runs with ``HF_HUB_OFFLINE``.

Without ``--model`` it is a one-layer model with a context of 262,144 tokens, whose forward pass
costs little: what is left is the host's work.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.demo import machine
from benchmarks.demo.servers import ServerFailedError, stop_group
from benchmarks.field import aiperf_report as report
from benchmarks.field import aiperf_sessions as sessions_of
from benchmarks.models import CACHE, ROOT
from benchmarks.models.tiny import ensure_tiny
from benchmarks.serving.servers import (
    MAX_MODEL_LEN,
    MODEL_NAME,
    SIDES,
    Server,
    Settings,
    running_servers,
)
from benchmarks.serving.tables import save

SETTLE_S = 3.0
"""A CPU worker spins for one second after each request; totals are exact a second later."""
BLOCK_SIZE = 128
WARM_WORDS = 500
NUM_TAIL_CHARS = 3000
PLAY = (
    *("--endpoint-type", "chat", "--streaming", "--use-server-token-count"),
    *("--custom-dataset-type", "mooncake_trace", "--no-fixed-schedule"),
    *("--inter-turn-delay-cap-seconds", "0", "--extra-inputs", "temperature:0"),
    *("--no-gpu-telemetry", "--no-server-metrics", "--ui", "none"),
    *("--tokenizer", sessions_of.REPOSITORY),
)


class ToolFailedError(Exception):
    """AIPerf ended with an error, took too long, or sent something else than the sessions."""


@dataclass(frozen=True)
class Dataset:
    """What is played in every run."""

    file: Path
    sessions: list[sessions_of.Session]
    tokenizer: Path

    @property
    def num_turns(self) -> int:
        return sum(map(len, self.sessions))


def run_tool(arguments: Sequence[str], log: Path, limit_s: float, hub: Path) -> None:
    """Run AIPerf, as a process group that always ends.

    Raises:
        ToolFailedError: with the end of what it said.
    """
    variables = os.environ | {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )
        try:
            problem = f"exit status {process.wait(limit_s)}"
        except subprocess.TimeoutExpired:
            problem = f"still running after {limit_s:.0f} s"
        finally:
            stop_group(process)
    if problem != "exit status 0":
        tail = log.read_text(errors="replace")[-NUM_TAIL_CHARS:]
        raise ToolFailedError(f"{shlex.join(arguments)}: {problem}. The end of {log}:\n{tail}")


def tool_version(tool: str) -> str:
    """As AIPerf says it.

    Raises:
        ToolFailedError: it does not run.
    """
    try:
        done = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolFailedError(f"{tool}: {error}") from error
    if done.returncode != 0:
        raise ToolFailedError(f"{tool} --version: {done.stderr[-NUM_TAIL_CHARS:]}")
    return done.stdout.strip()


def synthesize(model: Path, folder: Path, args: argparse.Namespace) -> Dataset:
    """Make the sessions.

    Raises:
        ToolFailedError: AIPerf ended with an error, or wrote no dataset.
        BadSessionsError: the dataset is not what is expected.
    """
    recipe = folder / "sessions.json"
    numbers = sessions_of.recipe(args.scale, args.turns, args.max_answer_tokens)
    recipe.write_text(json.dumps(numbers, indent=1) + "\n")
    hub = sessions_of.offline_tokenizer(model, folder / "hub")
    command = [args.tool, "synthesize", "agentic-code", "--config", str(recipe)]
    command += ["--num-sessions", str(args.sessions), "--seed", str(args.seed)]
    command += ["--output", str(folder)]
    run_tool(command, folder / "synthesize.log", args.limit, hub)
    found = sorted(folder.glob("*/dataset.jsonl"))
    if len(found) != 1:
        raise ToolFailedError(f"{folder} has {len(found)} datasets instead of one")
    return Dataset(found[0], sessions_of.read(found[0]), hub)


def settings(dataset: Dataset, share: float, args: argparse.Namespace) -> Settings:
    """Of both servers, with a KV cache that holds this share of all sessions."""
    num_blocks = sessions_of.cache_blocks(dataset.sessions, share, BLOCK_SIZE)
    longest = sessions_of.longest_tokens(dataset.sessions)
    return Settings(
        arguments=(
            *("--max-num-batched-tokens", "8192", "--block-size", str(BLOCK_SIZE)),
            *("--num-gpu-blocks-override", str(num_blocks)),
            *args.serve,
        ),
        max_model_len=-(-longest // BLOCK_SIZE) * BLOCK_SIZE,
        kv_gib=args.kv_gib,
        dtype=args.dtype,
        environment={
            "VLLM_SERVER_DEV_MODE": "1",  # the route that resets the KV
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(args.threads),
        },
    )


def warm_up(server: Server, longest: int) -> None:
    """One prompt, so that the first run does not pay for what a server does once.

    Args:
        server: to ask.
        longest: tokens that the server takes; a word has up to seven.
    """
    words = " ".join(f"word{number}" for number in range(min(WARM_WORDS, longest // 10)))
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": words}],
        "max_tokens": 32,
        "temperature": 0,
    }
    httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300).raise_for_status()


@dataclass(frozen=True)
class Cell:
    """One place in the grid: both sides are run there, one after the other."""

    share: float
    concurrency: int
    round: int
    seed: int
    sides: tuple[str, ...]


def cells(args: argparse.Namespace) -> list[Cell]:
    """The grid; who begins alternates, and a seed comes once for each size of the cache."""
    grid = []
    for share in args.cache:
        seed = args.seed
        for number in range(args.rounds):
            for place, at_once in enumerate(args.concurrency):
                sides = SIDES if (place + number) % 2 == 0 else SIDES[::-1]
                grid.append(Cell(share, at_once, number, seed, sides))
                seed += 1
    return grid


def play(
    server: Server, cell: Cell, dataset: Dataset, folder: Path, args: argparse.Namespace
) -> report.Run:
    """Run the tool against one server, from a cold cache.

    Raises:
        ToolFailedError: it failed, or the server got other requests than the turns.
        BadExportError: AIPerf wrote something else than expected.
        ServerFailedError: the server ended, or did not forget its KV.
    """
    time.sleep(SETTLE_S)
    server.reset_prefix_cache()
    before = report.totals(server.metrics())
    out = folder / f"{server.side}-{cell.concurrency}-{cell.round}"
    command = [args.tool, "profile", *PLAY, "-m", MODEL_NAME, "--url", server.url]
    command += ["--input-file", str(dataset.file), "--num-sessions", str(len(dataset.sessions))]
    command += ["--concurrency", str(cell.concurrency), "--random-seed", str(cell.seed)]
    command += ["--output-artifact-dir", str(out)]
    if not args.unnamed:
        command += ["--session-header", "X-Session-ID"]
    run_tool(command, out.with_suffix(".log"), args.limit, dataset.tokenizer)
    time.sleep(SETTLE_S)
    server.check_alive()
    after = report.totals(server.metrics())
    grown = {name: value - before[name] for name, value in after.items()}
    run = report.read_run(
        out,
        grown,
        side=server.side,
        share=cell.share,
        concurrency=cell.concurrency,
        number=cell.round,
    )
    asked = run.requests + run.errors
    if asked != dataset.num_turns or (not run.errors and grown[report.FINISHED] != asked):
        raise ToolFailedError(
            f"{dataset.num_turns} turns, AIPerf counts {run.requests} answers and {run.errors} "
            f"errors, and the server finished {grown[report.FINISHED]:.0f} requests"
        )
    return run


def measure(
    model: Path, dataset: Dataset, folder: Path, args: argparse.Namespace
) -> Iterator[report.Run]:
    """All runs of the grid; the servers are started once for each size of the cache."""
    grid = cells(args)
    for share in args.cache:
        logs = folder / f"cache-{share:g}"
        common = settings(dataset, share, args)
        with running_servers(model, logs, say, settings=common) as servers:
            held = {side: server.num_cache_tokens() for side, server in servers.items()}
            say(f"KV caches of {held} tokens, requests of at most {common.max_model_len}")
            if len(set(held.values())) != 1:
                raise ServerFailedError(f"the KV caches differ: {held} tokens")
            for server in servers.values():
                warm_up(server, common.max_model_len)
            for cell in (each for each in grid if each.share == share):
                for side in cell.sides:
                    run = play(servers[side], cell, dataset, logs, args)
                    say(
                        f"cache {share:.0%}, {cell.concurrency} at once, round {cell.round + 1}, "
                        f"{side}: {run.seconds:.0f} s, {run.requests_per_s:.2f} requests/s, "
                        f"TTFT {run.ttft_ms_p50:.0f} ms, {run.errors} errors"
                    )
                    yield run


def say(text: str) -> None:
    """One line of progress."""
    print(text, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--tool", required=True, help="the program aiperf")
    add("--sessions", type=int, default=32, help="(%(default)s)")
    add("--turns", type=int, default=4, help="mean of a session (%(default)s), at least 3")
    add("--scale", type=float, default=0.25, help="of AIPerf's own lengths (%(default)s)")
    add("--max-answer-tokens", type=int, default=64, help="longest answer (%(default)s)")
    add("--concurrency", type=int, nargs="+", default=[1, 8, 32], help="sessions at once")
    cache = "sizes of the KV cache, as shares of the tokens of all sessions"
    add("--cache", type=float, nargs="+", default=[0.4, 1.0], help=cache)
    add("--rounds", type=int, default=2, help="(%(default)s)")
    add("--seed", type=int, default=1, help="of the sessions and their words (%(default)s)")
    add("--unnamed", action="store_true", help="sessions have no id that the plugin reads")
    add("--limit", type=float, default=400, help="seconds for one run of AIPerf (%(default)s)")
    add("--model", type=Path, help="a folder; default: the one-layer model")
    add("--dtype", default="float32")
    add("--kv-gib", type=int, default=1)
    add("--threads", type=int, default=1, help="of OpenMP, for each server (%(default)s)")
    add("--serve", nargs="*", default=[], help="more arguments of vllm serve")
    add("--out", type=Path, default=ROOT / "benchmarks" / "field" / "results" / "aiperf.json")
    add("--logs", type=Path, default=ROOT / "out" / "field" / "aiperf")
    args = parser.parse_args(arguments)
    numbers = (args.sessions, args.rounds, *args.concurrency)
    if min(numbers) < 1 or args.turns < 3 or args.scale <= 0 or min(args.cache) <= 0:
        parser.error("sessions, rounds and concurrency are at least 1, turns at least 3, rest > 0")
    return args


def document(version: str, dataset: Dataset, args: argparse.Namespace) -> dict[str, Any]:
    """What stands above the runs in the file."""
    blocks = {
        f"{share:g}": sessions_of.cache_blocks(dataset.sessions, share, BLOCK_SIZE)
        for share in args.cache
    }
    return {
        **machine.describe(),
        "command": f"python -m benchmarks.field.aiperf {shlex.join(sys.argv[1:])}",
        "tool": version,
        "model": args.model.name if args.model else "one layer",
        "sessions": len(dataset.sessions),
        "turns": dataset.num_turns,
        "kept_tokens": sessions_of.kept_tokens(dataset.sessions),
        "longest_tokens": sessions_of.longest_tokens(dataset.sessions),
        "block_size": BLOCK_SIZE,
        "cache_blocks": blocks,
        "session_header": None if args.unnamed else "X-Session-ID",
    }


def main() -> int:
    """Measure, print, write the file; 1 if something failed or a request got an error."""
    args = parse()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # stops the servers too
    start = time.monotonic()
    folder = (args.logs / time.strftime("%Y%m%d-%H%M%S")).resolve()
    folder.mkdir(parents=True)
    model = args.model or ensure_tiny(
        CACHE / "tiny-llama-262k", layers=1, heads=1, kv_heads=1, max_len=MAX_MODEL_LEN
    )
    runs: list[report.Run] = []
    try:
        version = tool_version(args.tool)
        dataset = synthesize(model, folder, args)
        say(
            f"AIPerf {version}: {len(dataset.sessions)} sessions, {dataset.num_turns} turns, "
            f"{sessions_of.kept_tokens(dataset.sessions):,} tokens"
        )
        for run in measure(model, dataset, folder, args):
            runs.append(run)
    except (
        ServerFailedError,
        ToolFailedError,
        report.BadExportError,
        sessions_of.BadSessionsError,
        httpx.HTTPError,
    ) as error:
        if runs:
            say(f"\n{report.run_table(runs)}")
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit) as stop:
        print(f"interrupted after {len(runs)} runs; the servers are stopped", file=sys.stderr)
        return int(stop.code or 1) if isinstance(stop, SystemExit) else 128 + signal.SIGINT
    finally:
        (folder / "runs.json").write_text(json.dumps([asdict(run) for run in runs], indent=1))
    say(f"\n{report.run_table(runs)}")
    say(f"\nHow many times better the plugin is\n\n{report.ratio_table(runs)}")
    save(args.out, document(version, dataset, args), runs)
    say(f"\n{time.monotonic() - start:.0f} s in all; written: {args.out}")
    return 1 if any(run.errors for run in runs) else 0


if __name__ == "__main__":
    raise SystemExit(main())
