# SPDX-License-Identifier: Apache-2.0
"""Sub-agents that start at the same moment on the same long history.

    python -m benchmarks.serving.bench_burst [--block-size 32,64] [--quick]

Stock vLLM and vLLM with the plugin get the same bursts in turn, each with a prefix that was never
seen before and an empty cache. How often is the prefix computed? Once is enough.
"""

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx

from benchmarks.demo import machine
from benchmarks.demo.servers import ServerFailedError
from benchmarks.ports import HOST
from benchmarks.serving import burst_report as report
from benchmarks.serving import recorded, replay
from benchmarks.serving.burst_load import FORKED, STAGGERED, VARIANTS, Burst, make_burst
from benchmarks.serving.burst_report import Sample
from benchmarks.serving.client import ChatClient, RequestFailedError, encode_body
from benchmarks.serving.pressure_play import warm_up
from benchmarks.serving.replay import DEFAULT_BUDGET, MODEL_NAME, Tokens
from benchmarks.serving.servers import Server, running_servers
from benchmarks.serving.tables import save

PAUSE_S = 1.3  # a CPU worker spins for one second after each request
STAGGER_S = 0.1
LEAD_S = 0.2  # for the threads to start in
MAX_ANSWER_TOKENS = 128
BUDGETS = (DEFAULT_BUDGET,)  # vLLM's; 2048 for a server on a CPU
MIN_TEXT_CHARS = 500
SPARE_TOKENS = 300
QUICK = {"prefix_tokens": 5000, "bursts": 1, "model": replay.SMALL}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    replay.add_options(parser, model=replay.SMOLLM2, out="burst.json")
    add = parser.add_argument
    add("--block-size", type=replay.names, default=("32",), help="32,64; a CPU knows no 16")
    add("--max-num-batched-tokens", dest="budget", type=replay.names, default=BUDGETS)
    add("--variants", type=replay.names, default=VARIANTS, help="comma-separated (all)")
    add("--bursts", type=int, default=6, help="of each variant, on each side (%(default)s)")
    add("--agents", type=int, default=8, help="requests of a burst (%(default)s)")
    add("--prefix-tokens", type=int, default=6000, help="that they share (%(default)s)")
    add("--private-tokens", type=int, default=100, help="at the end of each (%(default)s)")
    add("--long-prefill-token-threshold", dest="threshold", type=int, default=0)
    add("--answer-tokens", type=int, default=16, help="(%(default)s)")
    args = replay.parse_quick(parser, arguments, QUICK)
    if unknown := set(args.variants) - set(VARIANTS):
        parser.error(f"no such variant: {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    if max_len(args) > replay.MAX_TOKENS:
        parser.error(f"requests would be longer than the {replay.MAX_TOKENS} tokens of the model")
    return args


def max_len(args: argparse.Namespace) -> int:
    """Of a request with its answer."""
    return int(args.prefix_tokens + args.private_tokens + args.answer_tokens + SPARE_TOKENS)


def make_bursts(args: argparse.Namespace, tokens: Tokens) -> dict[str, list[Burst]]:
    """The bursts of each variant; all settings get the same ones."""
    conversations = recorded.conversations(
        args.traces, args.sources, tokens.count, max_answer_tokens=MAX_ANSWER_TOKENS
    )
    texts = recorded.texts(args.traces, recorded.ONE_SHOT_SOURCE, MIN_TEXT_CHARS)
    return {
        variant: [
            make_burst(
                f"{variant}-{args.seed}-{number}",
                args.seed,
                conversations,
                texts,
                num_prefix_tokens=args.prefix_tokens,
                num_private_tokens=args.private_tokens,
                num_agents=args.agents,
                ids=tokens.ids,
            )
            for number in range(1, args.bursts + 1)
        ]
        for variant in args.variants
    }


class Player:
    """Plays bursts to the servers of one setting."""

    def __init__(
        self,
        servers: dict[str, Server],
        tokens: Tokens,
        block_size: int,
        budget: str,
        num_answer_tokens: int,
    ) -> None:
        self._servers = servers
        self._tokens = tokens
        self._setting = (block_size, budget)
        self._num_answer_tokens = num_answer_tokens

    def play(self, variant: str, bursts: Sequence[Burst]) -> Iterator[Sample]:
        """Burst by burst, stock and plugin in turn."""
        for burst in bursts:
            for side, server in self._servers.items():
                time.sleep(PAUSE_S)
                server.reset_prefix_cache()
                if variant == FORKED:
                    self._play_parent(server, burst)
                samples = self._play_burst(side, server, variant, burst)
                server.check_alive()
                _say_progress(samples)
                yield from samples

    def _play_parent(self, server: Server, burst: Burst) -> None:
        """A turn of the parent's session; unmeasured."""
        pinned = self._tokens.pinned(replay.IDS, burst.answer)
        num_tokens = self._tokens.count(burst.answer) + 1
        fields = {"session_id": f"{burst.name}-parent", **pinned}
        body = encode_body(MODEL_NAME, list(burst.parent), num_tokens, **fields)
        with ChatClient(HOST, server.port) as client:
            if client.ask(body).text != burst.answer:
                raise RequestFailedError("the parent did not give the recorded answer")

    def _play_burst(self, side: str, server: Server, variant: str, burst: Burst) -> list[Sample]:
        """All sub-agents, each in a thread of its own."""
        agents = range(len(burst.tasks))
        step_s = STAGGER_S if variant == STAGGERED else 0.0
        with ThreadPoolExecutor(max_workers=len(agents)) as threads:
            start_s = time.perf_counter() + LEAD_S
            futures = []
            for agent in agents:
                least = burst.least_prefill(variant)
                sample = Sample(side, *self._setting, variant, burst.name, agent, least)
                due_s = start_s + agent * step_s
                futures.append(threads.submit(self._ask, server, burst, sample, start_s, due_s))
            for future in futures:
                future.result()
        return [future.result() for future in futures]

    def _ask(
        self, server: Server, burst: Burst, sample: Sample, start_s: float, due_s: float
    ) -> Sample:
        num_tokens, session = self._num_answer_tokens, f"{burst.name}-agent-{sample.agent}"
        body = encode_body(
            MODEL_NAME,
            burst.messages(sample.agent),
            num_tokens,
            min_tokens=num_tokens,
            session_id=session,
        )
        time.sleep(max(0.0, due_s - time.perf_counter()))
        try:
            with ChatClient(HOST, server.port) as client:
                reply = client.ask(body)
        except (OSError, RequestFailedError) as error:
            sample.error = f"{type(error).__name__}: {str(error)[:300]}"
            return sample
        sample.sent_s = reply.sent_s - start_s
        sample.ttft_ms = (reply.first_text_s - reply.sent_s) * 1000
        sample.total_ms = (reply.end_s - reply.sent_s) * 1000
        sample.num_prompt_tokens = reply.num_prompt_tokens
        sample.num_cached_tokens = reply.num_cached_tokens
        sample.text = reply.text
        return sample


def _say_progress(samples: Sequence[Sample]) -> None:
    first = samples[0]
    num_computed = sum(s.num_prompt_tokens - s.num_cached_tokens for s in samples)
    last_s = max(sample.sent_s + sample.total_ms / 1000 for sample in samples)
    say(
        f"block {first.block_size}, budget {first.budget}, {first.burst}, {first.side}: "
        f"{num_computed} tokens computed, least {first.least_prefill}, {last_s:.1f} s"
    )


def measure(args: argparse.Namespace) -> list[Sample]:
    """All variants under all settings; the servers are started anew for each setting."""
    model = replay.model_folder(args.model)
    tokens = Tokens(model)
    bursts = make_bursts(args, tokens)
    samples: list[Sample] = []
    for block_size in map(int, args.block_size):
        for budget in args.budget:
            settings = replay.settings(
                max_len(args),
                block_size=block_size,
                budget=budget,
                cores=args.cores,
                threshold=args.threshold,
            )
            with running_servers(model, args.logs, say, settings=settings) as servers:
                player = Player(servers, tokens, block_size, budget, args.answer_tokens)
                try:
                    for server in servers.values():
                        warm_up(server.port, partial(tokens.pinned, replay.IDS))
                    for variant in args.variants:
                        samples += player.play(variant, bursts[variant])
                except (OSError, httpx.HTTPError, RequestFailedError) as error:
                    raise ServerFailedError(_report(servers, error)) from error
    return samples


def _report(servers: dict[str, Server], error: Exception) -> str:
    return "\n".join(server.report(str(error)) for server in servers.values())


def say(text: str) -> None:
    """One line of progress."""
    print(text, flush=True)


def main() -> int:
    """Measure, print the table, write the file."""
    args = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # stops the servers too
    command = f"python -m benchmarks.serving.bench_burst {shlex.join(sys.argv[1:])}".strip()
    about = machine.describe() | {"command": command, "options": replay.written(args)}
    try:
        samples = measure(args)
    except (recorded.NoTracesError, ServerFailedError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    rows = report.make_rows(samples)
    say(f"\n{report.table(rows)}")
    for line in report.faults(samples):
        say(line)
    save(args.out, report.document(about, rows), samples)
    say(f"\nwritten: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
