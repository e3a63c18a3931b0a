# SPDX-License-Identifier: Apache-2.0
"""vLLM over HTTP on one GPU, stock against the plugin, within a given time.

    python -m benchmarks.gpu.serving --out OUT --seconds 265 [--sides stock,plugin] [--shape tiny]
    python -m benchmarks.gpu.serving --tables OUT/serving.jsonl

All servers start side by side, with weights that vLLM makes up and as many layers as fit; answers
are pinned to recorded text. Then one session of 100,000 tokens, recorded agents one at a time, and
sixteen at once. Every row is in OUT/serving.jsonl as soon as it exists; a side that fails leaves
the others. Recorded text and tokenizer come from --replay (see `serving_text`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.limited import read_rows
from benchmarks.gpu.serving_plays import Stage
from benchmarks.gpu.serving_sides import (
    ALL_SIDES,
    PLUGIN,
    STOCK,
    Model,
    Side,
    SideFailedError,
    device,
    fitting_layers,
    start,
)
from benchmarks.gpu.serving_tables import tables
from benchmarks.gpu.serving_text import LONGEST, Texts, Tokens, load
from benchmarks.models.dummy import SHAPES

END_S = 4.0  # for ending servers and printing
WARM_UP_S = 30.0
SHARE_OF_LONG, SHARE_OF_AGENTS = 0.35, 0.62  # of the time that is left when they begin
ANSWERS_TOKENS = 2048
LONG_SIDES = (STOCK, PLUGIN)
LIMITS: Mapping[bool, Mapping[str, Any]] = {
    True: {"context": 100_000, "longest": LONGEST, "pause": 0.15, "turns": 12},
    False: {"context": 6_000, "longest": 6_200, "pause": 1.3, "turns": 4},
}
"""On a GPU, and on a CPU, whose worker spins for one second after each request."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out"), help="rows and logs (%(default)s)")
    add("--seconds", type=float, default=265, help="it ends after them (%(default)s)")
    add("--shape", choices=SHAPES, default="llama-8b")
    add("--sides", default=",".join(ALL_SIDES), help="(%(default)s)")
    add("--long-sides", default=",".join(LONG_SIDES), help="of the long session (%(default)s)")
    add("--layers", type=int, help="of the model; as many as fit")
    add("--start-seconds", type=float, default=140, help="a side that needs longer is left out")
    add("--context", type=int, help="tokens of the long session")
    add("--turns", type=int, help="its later turns")
    add("--sessions", type=int, default=16, help="at once (%(default)s)")
    add("--sessions-turns", type=int, default=3, help="turns of each of them (%(default)s)")
    add("--replay", type=Path, default=os.environ.get("REPLAY"), help="text and tokenizer")
    add("--tables", type=Path, help="only print the tables of such a file")
    args = parser.parse_args(arguments)
    args.sides, args.long_sides = args.sides.split(","), args.long_sides.split(",")
    if unknown := set(args.sides) - set(ALL_SIDES):
        parser.error(f"no such side: {', '.join(sorted(unknown))}")
    if args.replay is None and args.tables is None:
        parser.error("say with --replay or REPLAY where recorded text and tokenizer are")
    return args


def chosen_model(args: argparse.Namespace, found: Mapping[str, Any] | None) -> Model:
    """The shape with as many layers as the device has room for."""
    is_on_gpu = found is not None
    deltas = (args.turns + 1) * 760
    max_len = max(args.context + deltas, args.longest + ANSWERS_TOKENS) // 256 * 256 + 256
    if args.layers:
        layers = args.layers
    elif found is None:
        layers = SHAPES[args.shape]["num_hidden_layers"]
    else:
        layers = fitting_layers(args.shape, found["memory"], len(args.sides), max_len)
    return Model(args.shape, layers, max_len, is_on_gpu)


def wait(sides: Sequence[Side], stage: Stage, until: float) -> None:
    """Until every side answers or has failed: starting servers would disturb what is timed."""
    while waiting := [side for side in stage.playing() if side.ready_s is None]:
        for side in waiting:
            try:
                if side.is_ready():
                    stage.write(
                        part="start", side=side.name, seconds=side.ready_s, said=side.said()
                    )
                    stage.say(f"{side.name}: ready after {side.ready_s:.0f} s")
                elif time.monotonic() > until:
                    raise SideFailedError(side.report("not ready in time"))
            except SideFailedError as error:
                stage.fail(side, "start", str(error))
        time.sleep(0.25)


def play(args: argparse.Namespace, stage: Stage, texts: Texts, until: float) -> None:
    """The parts, most valuable first; each gets a share of the time that is left."""

    def share(of: float) -> float:
        now = time.monotonic()
        return now + max(0.0, until - now) * of

    stage.warm_up(texts.together, min(until, time.monotonic() + args.warm_up))
    stage.forget("warm-up")
    stage.say("one long session")
    stage.long(texts.long, args.long_sides, share(SHARE_OF_LONG))
    stage.forget("long")
    stage.say("agents, one at a time")
    stage.agents(texts.agents, share(SHARE_OF_AGENTS))
    stage.forget("agents")
    stage.say("agents at once")
    stage.together(texts.together, args.sessions_turns, until)
    # A hybrid shape with MTP drafts has its place here: another Model, after these have ended.


def run(args: argparse.Namespace, rows: Path, began: float) -> None:
    """Start, play, and leave no process behind."""
    until = began + args.seconds - END_S
    found = device()
    for name, value in LIMITS[found is not None].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.warm_up = WARM_UP_S if found else args.seconds
    model = chosen_model(args, found)
    scratch = Path(tempfile.mkdtemp(prefix="serving-"))
    sides: list[Side] = []

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:.0f} s] {text}", flush=True)

    try:
        model.write(scratch / "model", args.replay)
        tokens = Tokens(args.replay)
        for name in args.sides:
            sides.append(start(name, model, scratch / "model", scratch, args.out))
        stage = Stage(sides, tokens, rows, args.pause, say)
        stage.write(
            part="run",
            device=found["name"] if found else "CPU",
            shape=model.shape,
            layers=model.layers,
            max_len=model.max_len,
            vllm=importlib.metadata.version("vllm"),
            commit=os.environ.get("COMMIT", ""),
            date=time.strftime("%Y-%m-%d"),
        )
        say(f"{model.layers} layers, starting {', '.join(args.sides)}")
        texts = load(args.replay, tokens, args.context, args.turns, args.sessions, args.longest)
        wait(sides, stage, min(until, time.monotonic() + args.start_seconds))
        play(args, stage, texts, until)
    finally:
        for side in sides:
            side.close()
        shutil.rmtree(scratch, ignore_errors=True)


def main() -> int:
    """Play and print the tables; 1 where a side failed or nothing was played."""
    began = time.monotonic()
    args = parse()
    rows = args.tables or args.out / "serving.jsonl"
    if not args.tables:
        # Whoever ends this one by its time limit ends the servers too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
        signal.signal(signal.SIGALRM, lambda *_: sys.exit("time is up"))
        signal.setitimer(signal.ITIMER_REAL, max(1.0, args.seconds - END_S / 2))
        args.out.mkdir(parents=True, exist_ok=True)
        rows.unlink(missing_ok=True)
        try:
            run(args, rows, began)
        finally:
            print(f"\n{tables(read_rows(rows))}\n[{time.monotonic() - began:.0f} s]", flush=True)
    else:
        print(tables(read_rows(rows)))
    found = list(read_rows(rows))
    is_bad = not any("total_ms" in row for row in found) or any("failed" in row for row in found)
    return 1 if is_bad else 0


if __name__ == "__main__":
    sys.exit(main())
