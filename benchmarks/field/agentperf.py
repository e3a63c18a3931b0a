# SPDX-License-Identifier: Apache-2.0
"""Artificial Analysis's ``agentperf-local``: recorded agent tasks, against stock and the plugin.

    python -m benchmarks.field.agentperf --tool PATH/TO/agentperf-local --tiktoken-cache FOLDER
        [--replay agentperf-default-v1 | aa-mini-v1] [--rounds 3] [--tool-mode none | fixed_delay]
        [--sides stock,plugin,fast] [--model FOLDER | --family lfm2] [--model-len TOKENS]

The tool (package ``agentperf-local``, Python 3.12) brings the tasks along. It replays 168 turns,
one at a time, with the recorded messages and number of answer tokens, and names no session. Three
servers run: stock vLLM with prefix caching, the plugin, and the plugin with
``--stateful-profile fast``. The tool runs against each in turn, and each round begins with another.
Its own figures are kept. The tokens computed are the server's (``usage``), and what became of each
turn is read from the plugin's ``/v1/turns``.

Without ``--model`` it is a one-layer model with a context of 262,144 tokens, whose forward pass
costs little: what is left is the host's work. With ``--family`` it is a family of
``benchmarks.models.shapes`` in small, a hybrid one for example, with weights that vLLM makes up.
The tool needs the file that tiktoken downloads for o200k_base, in the folder of
``--tiktoken-cache`` (``TIKTOKEN_CACHE_DIR``).
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
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.demo import machine
from benchmarks.demo.servers import ServerFailedError
from benchmarks.models import CACHE, ROOT, shapes
from benchmarks.models.tiny import ensure_tiny
from benchmarks.serving.servers import (
    FAST,
    MAX_MODEL_LEN,
    OURS,
    PLUGIN,
    STOCK,
    Server,
    Settings,
    running_servers,
)
from benchmarks.serving.tables import markdown, percentile, ratio, save

SIDES = (STOCK, PLUGIN, FAST)
SETTLE_S = 3.0
"""A CPU worker spins for one second after each request."""
MODEL_LEN = 131_072
PAGE = 200
"""Turns of one answer of ``/v1/turns``, at most."""
NO_TOOLS = ("--tool-choice", "none", "--no-power", "--no-progress")
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"


@dataclass
class Turn:
    """One turn of one run of the tool.

    Attributes:
        first_s: Time to the first token, as the tool measured it.
        total_s: To the end of the answer.
        outcome: As the plugin calls it; empty in stock vLLM.
    """

    side: str
    round: int
    turn: str
    prompt_tokens: int
    computed_tokens: int
    output_tokens: int
    first_s: float
    total_s: float
    outcome: str


class ToolFailedError(Exception):
    """agentperf-local ended with an error, or a turn of it failed."""


def run_tool(server: Server, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the tool once.

    Returns:
        What it wrote of each turn.

    Raises:
        ToolFailedError: with the end of what it said.
    """
    command = [args.tool, "run", "--base-url", f"{server.url}/v1", "--model", "tiny"]
    command += ["--output-dir", str(folder), "--replay", args.replay, *NO_TOOLS]
    command += ["--tool-mode", args.tool_mode]
    environment = os.environ | {"TIKTOKEN_CACHE_DIR": str(args.tiktoken_cache.resolve())}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise ToolFailedError(f"{shlex.join(command)}: {(done.stdout + done.stderr)[-2000:]}")
    rows = [json.loads(line) for line in (folder / "turns.jsonl").read_text().splitlines()]
    failed = [row["turn_id"] for row in rows if not row["success"]]
    if failed:
        raise ToolFailedError(f"{len(failed)} turns failed, the first is {failed[0]}")
    return rows


def outcomes(server: Server, num_turns: int) -> list[str]:
    """What became of the newest turns, the earliest first."""
    if server.side not in OURS:
        return [""] * num_turns
    answer = httpx.get(f"{server.url}/v1/turns", params={"limit": PAGE}, timeout=60)
    found = [turn["outcome"] for turn in answer.raise_for_status().json()["turns"]]
    if len(found) < num_turns:
        raise ToolFailedError(f"the server remembers {len(found)} of {num_turns} turns")
    return found[:num_turns][::-1]


def samples(server: Server, number: int, folder: Path, args: argparse.Namespace) -> Iterator[Turn]:
    """Run the tool against one server; its turns."""
    rows = run_tool(server, folder, args)
    became = outcomes(server, len(rows))
    for row, outcome in zip(rows, became, strict=True):
        tokens, timing = row["tokens"], row["timing"]
        yield Turn(
            server.side,
            number,
            row["turn_id"],
            tokens["server_prompt_tokens"],
            tokens["server_uncached_prompt_tokens"],
            tokens["server_output_tokens"],
            timing["time_to_first_token_ms"] / 1000,
            timing["e2e_latency_ms"] / 1000,
            outcome,
        )


def later(turns: Sequence[Turn]) -> list[Turn]:
    """Those that are not the first of their task."""
    return [turn for turn in turns if not turn.turn.endswith(":0000")]


def row_of(turns: Sequence[Turn], stock: Sequence[Turn]) -> list[str]:
    """One line of the table."""
    first, total = ([getattr(turn, name) for turn in turns] for name in ("first_s", "total_s"))
    base = [turn.first_s for turn in stock], [turn.total_s for turn in stock]
    outcome = Counter(turn.outcome for turn in turns)
    became = ", ".join(f"{count} {name}" for name, count in outcome.most_common() if name)
    return [
        turns[0].side,
        f"{1000 * percentile(first, 0.5):,.0f} / {1000 * percentile(first, 0.95):,.0f}",
        ratio(percentile(base[0], 0.5), percentile(first, 0.5)),
        f"{1000 * percentile(total, 0.5):,.0f} / {1000 * percentile(total, 0.95):,.0f}",
        ratio(percentile(base[1], 0.5), percentile(total, 0.5)),
        f"{sum(turn.computed_tokens for turn in turns):,}",
        became or "-",
    ]


def table(turns: Sequence[Turn], sides: Sequence[str]) -> str:
    """Turns behind the first of each task, all rounds together."""
    head = ["side", "first token ms, p50 / p95", "stock / it", "whole turn ms, p50 / p95"]
    head += ["stock / it", "tokens computed", "turns"]
    stock = later([turn for turn in turns if turn.side == STOCK])
    of_side = (later([turn for turn in turns if turn.side == side]) for side in sides)
    return markdown(head, [row_of(each, stock) for each in of_side])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tool", required=True, help="the program agentperf-local")
    parser.add_argument("--tiktoken-cache", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--replay", default="agentperf-default-v1")
    parser.add_argument("--tool-mode", default="none", choices=["none", "fixed_delay"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", type=lambda text: text.split(","), default=list(SIDES))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, help="a folder; default: the one-layer model")
    which.add_argument("--family", choices=shapes.SERVED, help="made up, in small")
    parser.add_argument("--model-len", type=int, default=MODEL_LEN)
    parser.add_argument("--kv-gib", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    out = ROOT / "benchmarks" / "field" / "results" / "agentperf.json"
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--logs", type=Path, default=ROOT / "out" / "field" / "agentperf")
    args = parser.parse_args(arguments)
    unknown = set(args.sides) - set(SIDES)
    if unknown or STOCK not in args.sides:
        parser.error(f"sides are some of {', '.join(SIDES)}, {STOCK} among them")
    return args


def model_of(args: argparse.Namespace) -> tuple[Path, tuple[str, ...]]:
    """The model, and what `vllm serve` has to be told of it."""
    if args.family:  # vLLM's default is no prefix caching where a model has recurrent states
        more = ("--load-format", "dummy", "--enable-prefix-caching")
        return shapes.ensure(args.family, MAX_MODEL_LEN), more
    one_layer = CACHE / "tiny-llama-262k"
    if args.model is None:
        ensure_tiny(one_layer, layers=1, heads=1, kv_heads=1, max_len=MAX_MODEL_LEN)
    return args.model or one_layer, ()


def main() -> int:
    """Measure, print, write the file."""
    args = parse()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # stops the servers too
    model, more = model_of(args)
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    settings = Settings(
        arguments=("--max-num-batched-tokens", "8192", *tools, *more),
        max_model_len=args.model_len,
        kv_gib=args.kv_gib,
        dtype=args.dtype,
    )
    turns: list[Turn] = []
    runs = args.logs / time.strftime("%Y%m%d-%H%M%S")
    try:
        with running_servers(model, runs, print, settings=settings, sides=args.sides) as servers:
            for number in range(args.rounds):
                turn = number % len(args.sides)
                for side in [*args.sides[turn:], *args.sides[:turn]]:
                    time.sleep(SETTLE_S)
                    turns += samples(servers[side], number, runs / f"{side}-{number}", args)
                    print(f"round {number}: {side} done", flush=True)
            drafts = {
                side: sum(
                    value
                    for name, value in servers[side].metrics().items()
                    if name.startswith(ACCEPTED)
                )
                for side in args.sides
            }
    except (ServerFailedError, ToolFailedError, httpx.HTTPError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\n{table(turns, args.sides)}\n\naccepted drafted tokens: {drafts}")
    document = {
        **machine.describe(),
        "command": f"python -m benchmarks.field.agentperf {shlex.join(sys.argv[1:])}",
        "replay": args.replay,
        "tool_mode": args.tool_mode,
        "model": Path(model).name,
        "accepted_drafts": drafts,
        "summaries": {
            folder.parent.name: json.loads(folder.read_text())["latency_distributions_ms"]
            for folder in sorted(runs.glob("*/summary.json"))
        },
    }
    save(args.out, document, turns)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
