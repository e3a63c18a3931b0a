# SPDX-License-Identifier: Apache-2.0
"""What drafts cost where nothing can be drafted: random answers, from 1 to 64 requests at once.

    python -m benchmarks.serving.bench_random [--concurrency 1,4,16,64] [--rounds 5] [--starts 1]
        [--plain-openmp] [--quick]

Stock vLLM and vLLM with drafts from sessions are made to say the same random tokens, turn about.
Nothing of it stood anywhere before, so that every draft is wrong. Two servers that are started
alike differ by a percent or more for as long as they live: small differences want several starts.
"""

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from random import Random

import httpx

from benchmarks.demo import machine
from benchmarks.demo.servers import ServerFailedError
from benchmarks.ports import HOST
from benchmarks.serving import replay
from benchmarks.serving.agents_play import PAUSE_S, drafts_of, since
from benchmarks.serving.bench_agents import BLOCK_SIZE, PLUGIN_CONFIG
from benchmarks.serving.client import ChatClient, RequestFailedError, encode_body
from benchmarks.serving.pressure_play import warm_up
from benchmarks.serving.servers import PLUGIN, STOCK, Server, running_servers
from benchmarks.serving.tables import markdown, percentile, save

MAX_LEN = 2048
FIRST_TOKEN, NUM_TOKENS = 300, 48_000
QUICK = {"concurrency": ("1", "4"), "rounds": 1, "model": replay.SMALL}


@dataclass
class Sample:
    """All requests of one round on one side.

    Attributes:
        start: Of the servers, from 0.
        total_s: From sending the first to the end of the last answer.
        num_drafted: Tokens, for all of them.
    """

    side: str
    concurrency: int
    start: int
    round: int
    total_s: float
    num_drafted: int


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    replay.add_options(parser, model=replay.SMOLLM2, out="random.json")
    add = parser.add_argument
    add("--concurrency", type=replay.names, default=("1", "4", "16", "64"))
    add("--rounds", type=int, default=5, help="(%(default)s)")
    add("--starts", type=int, default=1, help="of the servers, all rounds with each (%(default)s)")
    add("--tokens", type=int, default=48, help="of each answer (%(default)s)")
    add("--compiled", action="store_true", help="let vLLM compile the model (it is run eagerly)")
    text = "do not preload Intel's OpenMP, which vLLM asks for (it is preloaded)"
    add("--plain-openmp", action="store_true", help=text)
    return replay.parse_quick(parser, arguments, QUICK)


def play(server: Server, concurrency: int, name: str, num_tokens: int) -> float:
    """One round; seconds.

    Raises:
        RequestFailedError: an answer was not as long as it was to be.
    """
    chance = Random(name)

    def body() -> bytes:
        pinned = [FIRST_TOKEN + chance.randrange(NUM_TOKENS) for _ in range(num_tokens)]
        words = " ".join(str(chance.randrange(10**6)) for _ in range(4))
        messages = [{"role": "user", "content": words}]
        fields = {"ignore_eos": True, "vllm_xargs": {"pinned_ids": pinned}}
        return encode_body(replay.MODEL_NAME, messages, num_tokens, **fields)

    def ask(content: bytes) -> None:
        with ChatClient(HOST, server.port) as client:
            reply = client.ask(content)
        if reply.num_answer_tokens != num_tokens:
            raise RequestFailedError(f"{reply.num_answer_tokens} tokens instead of {num_tokens}")

    bodies = [body() for _ in range(concurrency)]
    with ThreadPoolExecutor(max_workers=concurrency) as threads:
        started = time.perf_counter()
        list(threads.map(ask, bodies))
        return time.perf_counter() - started


def measure(args: argparse.Namespace) -> list[Sample]:
    """All rounds; another side is the first each time."""
    model = replay.model_folder(args.model)
    tokens = replay.Tokens(model)
    settings = replay.settings(
        MAX_LEN,
        block_size=BLOCK_SIZE,
        cores=args.cores,
        side_arguments={PLUGIN: ("--speculative-config", json.dumps(PLUGIN_CONFIG))},
        is_eager=not args.compiled,
        is_plain=args.plain_openmp,
    )
    samples: list[Sample] = []
    for start in range(args.starts):
        with running_servers(model, args.logs, say, settings=settings) as servers:
            try:
                for server in servers.values():
                    warm_up(server.port, partial(tokens.pinned, replay.IDS))
                    for number in map(int, args.concurrency):
                        play(server, number, f"warm {number}", 8)
                for concurrency in map(int, args.concurrency):
                    samples += _rounds(args, servers, concurrency, start)
            except (OSError, httpx.HTTPError, RequestFailedError) as error:
                reports = [server.report(str(error)) for server in servers.values()]
                raise ServerFailedError("\n".join(reports)) from error
    return samples


def _rounds(
    args: argparse.Namespace, servers: Mapping[str, Server], concurrency: int, start: int
) -> Iterator[Sample]:
    for number in range(args.rounds):
        for side, server in list(servers.items())[:: 1 if number % 2 else -1]:
            time.sleep(PAUSE_S)
            before = drafts_of(server, "random", str(concurrency))
            name = f"{args.seed} {concurrency} {start} {number}"
            total_s = play(server, concurrency, name, args.tokens)
            drafted = since(before, drafts_of(server, "random", str(concurrency))).num_drafted
            say(f"{concurrency} at once, {side}: {total_s:.2f} s, {drafted} tokens drafted")
            yield Sample(side, concurrency, start, number, total_s, drafted)


def table(samples: Sequence[Sample]) -> str:
    """Medians; the ratio is of each pair, the least and the most beside the median, and then the
    median of each start.
    """
    lines = []
    for concurrency in dict.fromkeys(sample.concurrency for sample in samples):
        mine = [sample for sample in samples if sample.concurrency == concurrency]
        of = {
            side: {(s.start, s.round): s for s in mine if s.side == side}
            for side in (STOCK, PLUGIN)
        }
        times = {side: percentile([s.total_s for s in of[side].values()], 0.5) for side in of}
        pairs = {pair: of[PLUGIN][pair].total_s / of[STOCK][pair].total_s for pair in of[STOCK]}
        ratios = sorted(pairs.values())
        starts = [
            percentile([ratio for pair, ratio in pairs.items() if pair[0] == start], 0.5)
            for start in dict.fromkeys(start for start, _ in pairs)
        ]
        drafted = sum(sample.num_drafted for sample in of[PLUGIN].values())
        lines.append(
            [
                str(concurrency),
                *(f"{times[side]:.2f}" for side in of),
                f"{percentile(ratios, 0.5):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})",
                ", ".join(f"{ratio:.3f}" for ratio in starts),
                str(drafted),
            ]
        )
    heads = ["at once", "stock (s)", "plugin (s)", "plugin / stock", "each start", "drafted"]
    return markdown(heads, lines)


def say(text: str) -> None:
    """One line of progress."""
    print(text, flush=True)


def main() -> int:
    """Measure, print the table, write the file."""
    args = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # stops the servers too
    command = f"python -m benchmarks.serving.bench_random {shlex.join(sys.argv[1:])}".strip()
    about = machine.describe() | {"command": command, "options": replay.written(args)}
    try:
        samples = measure(args)
    except ServerFailedError as error:
        print(error, file=sys.stderr)
        return 1
    say(f"\n{table(samples)}")
    save(args.out, about | {"table": table(samples).splitlines()}, samples)
    say(f"\nwritten: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
