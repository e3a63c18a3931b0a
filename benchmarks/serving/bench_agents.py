# SPDX-License-Identifier: Apache-2.0
"""The paper's workloads: stock vLLM, stock with its own drafts, and the plugin, turn about.

    python -m benchmarks.serving.bench_agents [--workloads service,coding] [--quick]
    python -m benchmarks.serving.bench_agents --model llama-8b --modes live     # on one GPU
    python -m benchmarks.serving.bench_agents --model llama-8b --modes replay   # model runner V1

Three servers run at once, and each turn is sent to one after the other, so that they meet the same
machine. In replay the model is made to say what was recorded: all sides do the work for the same
tokens, and drafts are judged on real text. Live it speaks for itself, for as many tokens.
"""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import httpx

from benchmarks.demo import machine
from benchmarks.demo.servers import ServerFailedError
from benchmarks.serving import agents_report as report
from benchmarks.serving import recorded, replay
from benchmarks.serving.agents_load import WORKLOADS, Workload
from benchmarks.serving.agents_play import MODES, REPLAY, Drafts, Player, Sample, drafts_of, since
from benchmarks.serving.agents_report import SIDES
from benchmarks.serving.client import RequestFailedError
from benchmarks.serving.pressure_play import warm_up
from benchmarks.serving.replay import Tokens
from benchmarks.serving.servers import NGRAM, PLUGIN, Server, running_servers
from benchmarks.serving.tables import save

BLOCK_SIZE = 32
MAX_LEN = 8192
QUICK = {"workloads": ("service",), "modes": ("replay",), "conversations": 1, "model": replay.SMALL}
NGRAM_CONFIG = {"method": "ngram", "num_speculative_tokens": 5}
PLUGIN_CONFIG = {
    "method": "custom_class",
    "model": "vllm_stateful.adapters.speculation.SessionDrafter",
    "num_speculative_tokens": 16,
}

ON_DEVICE_CONFIG = {
    "method": "ngram_gpu",
    "num_speculative_tokens": 8,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 16,
}
"""What the plugin drafts with where model runner V2 can be used."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    replay.add_options(parser, model=replay.SMOLLM2, out="agents.json")
    add = parser.add_argument
    add("--workloads", type=replay.names, default=tuple(WORKLOADS), help="comma-separated (all)")
    add("--modes", type=replay.names, default=MODES, help="comma-separated (both)")
    add("--sides", type=replay.names, default=SIDES, help="comma-separated (all)")
    add("--conversations", type=int, default=4, help="of each workload (%(default)s)")
    add("--compiled", action="store_true", help="let vLLM compile the model (it is run eagerly)")
    add("--ngram-lookup", default="2,5", help="fewest and most tokens that it looks for")
    add("--ngram-tokens", type=int, default=5, help="drafted in each step (%(default)s)")
    args = replay.parse_quick(parser, arguments, QUICK)
    for given, known in ((args.workloads, WORKLOADS), (args.modes, MODES), (args.sides, SIDES)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return args


def settings(args: argparse.Namespace) -> replay.Settings:
    """Of the servers."""
    least, most = map(int, args.ngram_lookup.split(","))
    is_on_gpu, is_pinned = args.model == replay.LLAMA_8B, REPLAY in args.modes
    is_v2 = is_on_gpu and not is_pinned
    ngram = NGRAM_CONFIG | {
        "method": "ngram_gpu" if is_v2 else "ngram",
        "num_speculative_tokens": args.ngram_tokens,
        "prompt_lookup_min": least,
        "prompt_lookup_max": most,
    }
    configs = {NGRAM: ngram, PLUGIN: ON_DEVICE_CONFIG if is_v2 else PLUGIN_CONFIG}
    arguments = {
        side: ("--speculative-config", json.dumps(config)) for side, config in configs.items()
    }
    common = replay.settings(
        MAX_LEN,
        block_size=BLOCK_SIZE,
        cores=args.cores,
        side_arguments=arguments,
        is_eager=not (args.compiled or is_on_gpu),
    )
    return replay.on_gpu(common, len(args.sides), is_pinned=is_pinned) if is_on_gpu else common


def measure(args: argparse.Namespace) -> tuple[list[Sample], list[Drafts]]:
    """All workloads in all modes on the same servers, the caches emptied before each."""
    model = replay.model_folder(args.model)
    tokens = Tokens(model)
    makers = [WORKLOADS[name] for name in args.workloads]
    workloads = [make(args.traces, tokens.count, MAX_LEN, args.conversations) for make in makers]
    samples: list[Sample] = []
    drafts: list[Drafts] = []
    with running_servers(
        model, args.logs, say, settings=settings(args), sides=args.sides
    ) as servers:
        try:
            for server in servers.values():
                warm_up(server.port, partial(tokens.pinned, replay.IDS))
            for mode in args.modes:
                for workload in workloads:
                    played, drafted = play(servers, tokens, workload, mode, f"{args.seed}")
                    samples += played
                    drafts += drafted
        except (OSError, httpx.HTTPError, RequestFailedError) as error:
            reports = [server.report(str(error)) for server in servers.values()]
            raise ServerFailedError("\n".join(reports)) from error
    return samples, drafts


def play(
    servers: Mapping[str, Server], tokens: Tokens, workload: Workload, mode: str, run: str
) -> tuple[list[Sample], list[Drafts]]:
    """One workload on all servers, their caches emptied before it."""
    for server in servers.values():
        server.reset_prefix_cache()
    before = {side: drafts_of(server, mode, workload.name) for side, server in servers.items()}
    samples: list[Sample] = []
    for wave in Player(servers, tokens, workload, mode, run).play():
        samples += wave
        times = ", ".join(f"{each.side} {each.total_ms / 1000:.2f}" for each in wave)
        say(f"{mode} {workload.name} {wave[0].conversation} turn {wave[0].turn + 1}: {times}")
        for server in servers.values():
            server.check_alive()
    drafted = [
        since(before[side], drafts_of(server, mode, workload.name))
        for side, server in servers.items()
    ]
    say("\n" + report.table(report.make_rows(samples, drafted)) + "\n")
    return samples, drafted


def say(text: str) -> None:
    """One line of progress."""
    print(text, flush=True)


def main() -> int:
    """Measure, print the table, write the file and the picture."""
    args = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # stops the servers too
    command = f"python -m benchmarks.serving.bench_agents {shlex.join(sys.argv[1:])}".strip()
    about = machine.describe() | {"command": command, "options": replay.written(args)}
    try:
        samples, drafts = measure(args)
    except (recorded.NoTracesError, ServerFailedError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    rows = report.make_rows(samples, drafts)
    say(f"\n{report.table(rows)}")
    for line in report.faults(samples, rows):
        say(line)
    save(args.out, report.document(about, rows, drafts), samples)
    picture = Path(args.out).with_suffix(".png")
    report.save_plot(picture, samples, about)
    say(f"\nwritten: {args.out}, {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
