# SPDX-License-Identifier: Apache-2.0
"""Agent sessions and one-shot requests on a KV cache that is too small for all of them.

    python -m benchmarks.serving.bench_pressure [--capacity 0.4] [--quick]

Stock vLLM and vLLM with the plugin get the same open-loop load in turn, run by run, and forget all
KV before each run. A run replays recorded conversations with tool calls: every answer is pinned to
the recorded one, so both sides do the work of a model for the same tokens. The cache holds a share
of what live sessions hold on average; `--capacity natural` leaves it at its natural size.
"""

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import httpx

from benchmarks.demo import machine
from benchmarks.demo.servers import ServerFailedError
from benchmarks.serving import pressure_report as report
from benchmarks.serving import recorded, replay
from benchmarks.serving.client import RequestFailedError
from benchmarks.serving.pressure_capacity import cache_blocks, live
from benchmarks.serving.pressure_load import Load, LoadOptions, make_load
from benchmarks.serving.pressure_play import Player, num_planned, warm_up
from benchmarks.serving.pressure_report import Run
from benchmarks.serving.replay import Tokens
from benchmarks.serving.servers import SIDES, Server, running_servers
from benchmarks.serving.tables import save

PAUSE_S = 1.5  # a CPU worker spins for one second after each request
NATURAL = "natural"
MIN_TEXT_CHARS = 2000
QUICK = {"minutes": 0.6, "rounds": 1, "session_rate": 3.0}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line.

    The defaults make 11 turns of sessions and 2 to 3 one-shots a minute, which keep one core busy
    for about half of the time, and 13 live sessions of 2,900 tokens each. Waits are cut where one
    more would not fit into a run; recorded users often take longer.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    replay.add_options(parser, model=replay.SMALL, out="pressure.json")
    add = parser.add_argument
    add("--block-size", type=int, default=32, help="(%(default)s)")
    add("--max-num-batched-tokens", dest="budget", default=replay.DEFAULT_BUDGET)
    add("--capacity", type=_capacity, default=0.4, help="share of live tokens, or 'natural'")
    add("--rounds", type=int, default=2, help="loads, each played on both sides (%(default)s)")
    add("--minutes", type=float, default=4.0, help="in which turns arrive (%(default)s)")
    add("--sessions", type=int, default=40, help="at most so many in a run (%(default)s)")
    add("--session-rate", type=float, default=1.3, help="new ones a minute (%(default)s)")
    add("--one-shot-rate", type=float, default=3.0, help="a minute (%(default)s)")
    add("--tool-cap", type=float, default=60.0, help="longest wait for a tool (%(default)s s)")
    add("--user-cap", type=float, default=240.0, help="longest wait for a user (%(default)s s)")
    add("--max-answer-tokens", type=int, default=200, help="longer ones are cut (%(default)s)")
    add("--max-request-tokens", type=int, default=6000, help="sessions end there (%(default)s)")
    add("--schemas", action="store_true", help="tools as JSON schemas, not as signatures")
    add("--shared-system", action="store_true", help="sessions share their system message")
    add("--pin", choices=replay.PINS, default=replay.IDS, help="to ids, or text by a grammar")
    args = replay.parse_quick(parser, arguments, QUICK)
    if args.rounds < 1:
        parser.error("at least one round has to be played")
    return args


def _capacity(text: str) -> float | None:
    return None if text == NATURAL else float(text)


def make_loads(args: argparse.Namespace, tokens: Tokens) -> list[Load]:
    """One load for each round."""
    options = LoadOptions(
        max_sessions=args.sessions,
        session_rate=args.session_rate,
        one_shot_rate=args.one_shot_rate,
        minutes=args.minutes,
        tool_cap_s=args.tool_cap,
        user_cap_s=args.user_cap,
        max_request_tokens=args.max_request_tokens,
        has_own_line=not args.shared_system,
    )
    conversations = recorded.conversations(
        args.traces,
        args.sources,
        tokens.count,
        max_answer_tokens=args.max_answer_tokens,
        has_schemas=args.schemas,
    )
    gaps = recorded.gaps(args.traces)
    texts = recorded.texts(args.traces, recorded.ONE_SHOT_SOURCE, MIN_TEXT_CHARS)
    seeds = range(args.seed, args.seed + args.rounds)
    return [make_load(seed, options, conversations, gaps, texts, tokens.count) for seed in seeds]


def sizes(args: argparse.Namespace, loads: Sequence[Load]) -> tuple[int, int | None]:
    """The longest request that servers have to take, and the blocks of their KV cache.

    Raises:
        ValueError: the cache would be too small for a single request.
    """
    longest = max(load.longest_request for load in loads)
    max_len = min(-(-longest // args.block_size) * args.block_size, replay.MAX_TOKENS)
    if args.capacity is None:
        return max_len, None
    num_blocks = cache_blocks(args.capacity, [live(load) for load in loads], args.block_size)
    if num_blocks * args.block_size <= max_len:
        raise ValueError(
            f"a cache of {num_blocks * args.block_size} tokens is too small for the longest "
            f"request, {max_len} tokens; more or longer sessions, or a larger --capacity"
        )
    return max_len, num_blocks


def check_cache(servers: dict[str, Server], num_blocks: int | None, block_size: int) -> int:
    """The tokens that both caches hold, as their logs say.

    Raises:
        ServerFailedError: a cache has another size than it was told, or than the other one.
    """
    found = {side: server.num_cache_tokens() for side, server in servers.items()}
    told = set(found.values()) if num_blocks is None else {num_blocks * block_size}
    for side, server in servers.items():
        if told != {found[side]}:
            raise ServerFailedError(server.report(f"caches hold {found}, wanted {told} tokens"))
    return told.pop()


def play(
    args: argparse.Namespace, servers: dict[str, Server], loads: Sequence[Load], tokens: Tokens
) -> list[Run]:
    """Each load on each side; every run starts from an empty cache."""
    pin = partial(tokens.pinned, args.pin)
    runs: list[Run] = []
    try:
        for server in servers.values():
            warm_up(server.port, pin)
        for number, load in enumerate(loads, 1):
            for side in SIDES:
                runs.append(_play_run(servers[side], number, load, pin))
    except (OSError, httpx.HTTPError, RequestFailedError) as error:
        reports = "\n".join(server.report(str(error)) for server in servers.values())
        raise ServerFailedError(reports) from error
    return runs


def _play_run(server: Server, number: int, load: Load, pin: Callable[[str], dict[str, Any]]) -> Run:
    time.sleep(PAUSE_S)
    server.reset_prefix_cache()
    before = server.metrics()
    time.sleep(PAUSE_S)
    samples = Player(server.side, server.port, number, load, pin).play()
    time.sleep(PAUSE_S)  # the last step's numbers
    server.check_alive()
    metrics = report.grown(before, server.metrics())
    run = Run(server.side, number, num_planned(load), samples, metrics)
    say(
        f"round {number}, {server.side}: {len(samples)} of {run.num_planned} requests, "
        f"{run.num_prefilled} tokens computed, {run.busy_share:.0%} busy until "
        f"{max((s.end_s for s in samples), default=0.0):.0f} s, {run.num_failed} failed"
    )
    return run


def say(text: str) -> None:
    """One line of progress."""
    print(text, flush=True)


def tell(loads: Sequence[Load]) -> None:
    """Say what will be played."""
    for number, load in enumerate(loads, 1):
        now = live(load)
        say(
            f"round {number}: {len(load.sessions)} sessions, {num_planned(load)} requests in "
            f"{load.run_s:.0f} s, {len(load.one_shots)} of them one-shots; on average "
            f"{now.num_sessions:.1f} live sessions that hold {now.num_tokens:.0f} tokens "
            f"({now.num_unshared_tokens:.0f} if they shared nothing)"
        )


def main() -> int:
    """Measure, print the tables, write the file."""
    args = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # stops the servers too
    model = replay.model_folder(args.model)
    tokens = Tokens(model)
    command = f"python -m benchmarks.serving.bench_pressure {shlex.join(sys.argv[1:])}".strip()
    about = machine.describe() | {"command": command, "options": replay.written(args)}
    try:
        loads = make_loads(args, tokens)
        max_len, num_blocks = sizes(args, loads)
        tell(loads)
        settings = replay.settings(
            max_len,
            block_size=args.block_size,
            budget=args.budget,
            cores=args.cores,
            num_blocks=num_blocks,
        )
        with running_servers(model, args.logs, say, settings=settings) as servers:
            num_tokens = check_cache(servers, num_blocks, args.block_size)
            say(f"both KV caches: {num_tokens} tokens, the longest request: {max_len}")
            runs = play(args, servers, loads, tokens)
    except (recorded.NoTracesError, ServerFailedError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    cache = {"tokens": num_tokens, "blocks": num_blocks, "max_model_len": max_len}
    rows = report.make_rows(runs)
    say(f"\n{report.round_table(runs, loads)}")
    say(f"\nTime to first token (s, median / p90 / p99)\n\n{report.latency_table(rows, 'ttft_ms')}")
    say(f"\nWhole answer (s)\n\n{report.latency_table(rows, 'total_ms')}")
    say(f"\nPrompt tokens computed\n\n{report.prefill_table(rows)}")
    for line in report.faults(runs):
        say(line)
    samples = [sample for run in runs for sample in run.samples]
    save(args.out, report.document(about, loads, cache, runs), samples)
    say(f"\nwritten: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
