# SPDX-License-Identifier: Apache-2.0
"""Three agents with tools, five turns each, on stock vLLM and on vLLM with the plugin.

python -m benchmarks.demo                 both servers, a table of the turns, a summary and a plot
python -m benchmarks.demo --serve-only    the plugin's server alone, until Ctrl-C
"""

import argparse
import contextlib
import shlex
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from openai import OpenAI
from rich.console import Console

from benchmarks.demo import machine, report
from benchmarks.demo.agents import AGENTS, NUM_TURNS
from benchmarks.demo.examples import usage_examples
from benchmarks.demo.play import Player, warm_up
from benchmarks.demo.plot import save_plot
from benchmarks.demo.report import PLUGIN, STOCK, Row
from benchmarks.demo.screen import StartView, TurnView
from benchmarks.demo.servers import (
    Server,
    ServerFailedError,
    ServerOptions,
    free_port,
    is_free,
)
from benchmarks.models import smollm2

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
    add("--only", choices=[STOCK, PLUGIN], help="play on one server instead of both")
    add("--turns", type=int, default=NUM_TURNS, help="turns of each agent (%(default)s)")
    add("--out", type=Path, default=Path("out/demo"), help="folder of the results (%(default)s)")
    add("--model", type=Path, help="model folder (SmolLM2-135M-Instruct, made when missing)")
    add("--dtype", default="float32", help="bfloat16 or float32 (%(default)s)")
    add("--block-size", type=int, default=128, help="tokens in a KV block (%(default)s)")
    add("--kv-gib", type=int, default=1, help="memory for the KV cache, GiB (%(default)s)")
    add("--port", type=int, help=f"port of --serve-only ({SERVE_PORT} when it is free)")
    # For working on the demo itself: --plugin-args "" compares stock with stock.
    add("--plugin-args", default="--plugin stateful", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if not 1 <= arguments.turns <= NUM_TURNS:
        parser.error(f"--turns must be 1 to {NUM_TURNS}")
    return arguments


def demo(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    """Start the servers, play all turns, and leave a summary, a plot and the rows."""
    console = Console()
    names = [arguments.only] if arguments.only else [STOCK, PLUGIN]
    servers = start(arguments, names, stack, console)
    clients = {server.name: _client(server) for server in servers}
    warm_up(clients)
    player = Player(clients, uuid.uuid4().hex[:8])
    rows: list[Row] = []
    began = time.monotonic()
    with TurnView(console) as view:
        for step in range(arguments.turns):
            for agent in AGENTS:
                rows.append(player.play(agent, step, view.note))
                view.add(rows[-1])
    about = machine.describe() | {
        "model": player.model,
        "dtype": arguments.dtype,
        "block_size": str(arguments.block_size),
        "kv_cache": f"{arguments.kv_gib} GiB on each server",
        "plugin_arguments": arguments.plugin_args or "none",
        "duration": f"{time.monotonic() - began:.0f} s after start-up",
    }
    finish(arguments.out, rows, about)
    return 0


def serve(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    """Run the plugin's server until Ctrl-C, and say how to talk to it."""
    (server,) = start(arguments, [PLUGIN], stack, Console())
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
    extra = {STOCK: [], PLUGIN: shlex.split(arguments.plugin_args)}
    servers: list[Server] = []
    with StartView(console) as view:
        for name in names:
            port = _serve_port(arguments.port) if arguments.serve_only else free_port()
            log = arguments.out / f"{name}.log"
            server = stack.enter_context(Server(name, options, log, extra[name], port))
            servers.append(server)
            server.wait_until_ready(lambda: view.show(servers))
    return servers


def finish(out: Path, rows: Sequence[Row], about: dict[str, str]) -> None:
    """Print the summary and write the files."""
    summary = report.summarize(rows)
    report.save_json(out / "demo.json", rows, summary, about)
    save_plot(out / "demo.png", rows, about)
    print(f"\n{report.summary_text(summary, about)}\n")
    print(f"written: {out / 'demo.json'}, {out / 'demo.png'}")


def _serve_port(wanted: int | None) -> int:
    if wanted is not None:
        return wanted
    return SERVE_PORT if is_free(SERVE_PORT) else free_port()


def _client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def _leave(number: int, _: object) -> NoReturn:
    """End as after Ctrl-C, so that the servers are stopped."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
