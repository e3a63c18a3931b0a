# SPDX-License-Identifier: Apache-2.0
"""Three agents with tools, five turns each, on stock vLLM and on vLLM with the plugin.

python -m benchmarks.demo                        stock, and the plugin with its profiles exact and
                                                 fast: a table of the turns, a summary and a plot
python -m benchmarks.demo --sides stock,ngram    other servers; ngram is stock with its own drafts
python -m benchmarks.demo --serve-only           the plugin's server alone, until Ctrl-C
"""

import argparse
import contextlib
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from benchmarks.demo import machine, report
from benchmarks.demo.agents import AGENTS, NUM_TURNS
from benchmarks.demo.examples import usage_examples
from benchmarks.demo.play import Player, warm_up
from benchmarks.demo.plot import save_plot
from benchmarks.demo.report import Row
from benchmarks.demo.screen import StartView, TurnView
from benchmarks.demo.servers import Server, ServerFailedError, ServerOptions
from benchmarks.demo.sides import ARGUMENTS, DEFAULT, EXACT
from benchmarks.models import smollm2
from benchmarks.ports import free_port, is_free

SERVE_PORT = 8000


def main() -> int:
    arguments = parse(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        with contextlib.ExitStack() as stack:
            return serve(arguments, stack) if arguments.serve_only else demo(arguments, stack)
    except ServerFailedError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 0 if arguments.serve_only else 130


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--serve-only", action="store_true", help="run the plugin's server until Ctrl-C")
    add("--sides", default=",".join(DEFAULT), help="of stock,exact,fast,ngram (%(default)s)")
    add("--turns", type=int, default=NUM_TURNS, help="turns of each agent (%(default)s)")
    add("--out", type=Path, default=Path("out/demo"), help="folder of the results (%(default)s)")
    add("--model", type=Path, help="model folder (SmolLM2-135M-Instruct, made when missing)")
    add("--dtype", default="float32", help="bfloat16 or float32 (%(default)s)")
    add("--block-size", type=int, default=128, help="tokens in a KV block (%(default)s)")
    add("--kv-gib", type=int, default=1, help="memory for the KV cache, GiB (%(default)s)")
    add("--port", type=int, help=f"port of --serve-only ({SERVE_PORT} when it is free)")
    arguments = parser.parse_args(words)
    arguments.sides = arguments.sides.split(",")
    if unknown := set(arguments.sides) - ARGUMENTS.keys():
        parser.error(f"--sides: {', '.join(sorted(unknown))}; there are {', '.join(ARGUMENTS)}")
    if not 1 <= arguments.turns <= NUM_TURNS:
        parser.error(f"--turns must be 1 to {NUM_TURNS}")
    return arguments


def demo(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    """Start the servers, play all turns, and leave a summary, a plot and the rows."""
    console = Console()
    servers = start(arguments, arguments.sides, stack, console)
    by_name = {server.name: server for server in servers}
    warm_up(by_name)
    player = Player(by_name, uuid.uuid4().hex[:8])
    rows: list[Row] = []
    began = time.monotonic()
    with TurnView(console, arguments.sides) as view:
        for step in range(arguments.turns):
            for agent in AGENTS:
                rows.append(player.play(agent, step, view.note))
                view.add(rows[-1])
    player.explain(rows)
    about = machine.describe() | {
        "model": player.model,
        "dtype": arguments.dtype,
        "block_size": str(arguments.block_size),
        "kv_cache": f"{arguments.kv_gib} GiB on each server",
        "arguments": ", ".join(
            f"{side}: {' '.join(ARGUMENTS[side]) or 'none'}" for side in arguments.sides
        ),
        "duration": f"{time.monotonic() - began:.0f} s after start-up",
    }
    finish(arguments.out, rows, about)
    return 0


def serve(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    """Run the plugin's server until Ctrl-C, and say how to talk to it."""
    (server,) = start(arguments, [EXACT], stack, Console())
    print(usage_examples(server.url), flush=True)
    print("The server runs until Ctrl-C.", flush=True)
    while True:
        server.check_alive()
        time.sleep(1)


def start(
    arguments: argparse.Namespace,
    names: Sequence[str],
    stack: contextlib.ExitStack,
    console: Console,
) -> list[Server]:
    """Start these servers one after the other: the second finds what the first has compiled."""
    options = ServerOptions(
        model=arguments.model or smollm2.ensure(),
        dtype=arguments.dtype,
        kv_gib=arguments.kv_gib,
        block_size=arguments.block_size,
    )
    servers: list[Server] = []
    with StartView(console) as view:
        for name in names:
            port = _serve_port(arguments.port) if arguments.serve_only else free_port()
            log = arguments.out / f"{name}.log"
            server = stack.enter_context(Server(name, options, log, ARGUMENTS[name], port))
            servers.append(server)
            server.wait_until_ready(lambda: view.show(servers))
    return servers


def finish(out: Path, rows: Sequence[Row], about: dict[str, str]) -> None:
    """Print the summary and write the files."""
    summary = report.summarize(rows)
    report.save_json(out / "demo.json", rows, summary, about)
    save_plot(out / "demo.png", rows, about)
    parts = [
        report.summary_text(summary, about),
        report.differences_text(rows),
        report.explained_text(rows),
    ]
    for part in filter(None, parts):
        print(f"\n{part}")
    print(f"\nwritten: {out / 'demo.json'}, {out / 'demo.png'}")


def _serve_port(wanted: int | None) -> int:
    if wanted is not None:
        return wanted
    return SERVE_PORT if is_free(SERVE_PORT) else free_port()


def _leave(number: int, _: object) -> NoReturn:
    """End as after Ctrl-C, so that the servers are stopped."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
