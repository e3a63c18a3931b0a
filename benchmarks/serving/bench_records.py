# SPDX-License-Identifier: Apache-2.0
"""What the records of turns cost: time to first token and whole turn, with them and without.

    python -m benchmarks.serving.bench_records [--contexts 2000,20000] [--turns 30] [--rounds 10]

One server with the plugin runs a one-layer model. Two conversations of one length go on side by
side, turn by turn, in turns the one and the other first. The turns of one are recorded, those of
the other are not (``switched_server``). Each round has two new conversations, and a round in which
the other one is recorded follows. Two servers, one with ``--stateful-explain off``, would not do:
servers that are started alike differ by some percent for as long as they live.

What is told is the median of the ratios turn by turn, and the range in which 95% of the medians lie
when rounds, and turns in them, are resampled.
"""

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import httpx

from benchmarks.demo import machine
from benchmarks.demo.servers import ServerFailedError
from benchmarks.models import CACHE, ROOT
from benchmarks.models.tiny import ensure_tiny
from benchmarks.ports import HOST
from benchmarks.serving import conversation, replay
from benchmarks.serving.client import ChatClient, Reply, encode_body
from benchmarks.serving.conversation import Count
from benchmarks.serving.servers import (
    MAX_MODEL_LEN,
    MODEL_NAME,
    PLUGIN,
    Server,
    Settings,
    running_servers,
)
from benchmarks.serving.switched_server import Switch
from benchmarks.serving.tables import markdown, percentile, save

MAX_TOKENS = 8
DELTA_TOKENS = 170
NUM_MESSAGES = 9
NUM_WARM_TURNS = 2
PAUSE_S = 0.02
"""Between two turns, so that what the server does behind an answer is done."""
RESAMPLES = 2000


class WrongSwitchError(RuntimeError):
    """Turns were recorded that should not have been, or the other way round."""


@dataclass
class Pair:
    """One turn of both conversations: seconds to the first token, and to the end."""

    round: int
    context: int
    turn: int
    first_s: float
    first_without_s: float
    total_s: float
    total_without_s: float


def play(
    server: Server, switch: Switch, number: int, context: int, num_turns: int, count: Count
) -> Iterator[Pair]:
    """Two conversations of one length, one of them recorded.

    Raises:
        WrongSwitchError: the records are not what the switch said.
    """
    client = ChatClient(HOST, server.port)
    seeds = (2 * number, 2 * number + 1)
    first = {
        on: conversation.history(context + seed, context, NUM_MESSAGES, count)
        for on, seed in zip((True, False), seeds if number % 2 else seeds[::-1], strict=True)
    }
    num_turns += NUM_WARM_TURNS
    both = {
        on: conversation.turns(number, messages, num_turns, DELTA_TOKENS, count)
        for on, messages in first.items()
    }
    names = {on: f"{number}-{context}-{'with' if on else 'without'}" for on in both}
    for turn in range(num_turns):
        replies: dict[bool, Reply] = {}
        for on in (True, False) if (turn + number) % 2 else (False, True):
            body = encode_body(
                MODEL_NAME, next(both[on]), MAX_TOKENS, prompt_cache_key=names[on], ignore_eos=True
            )
            switch.turn(on=on)
            replies[on] = client.ask(body)
            time.sleep(PAUSE_S)
        if turn >= NUM_WARM_TURNS:
            ours, without = replies[True], replies[False]
            yield Pair(
                number,
                context,
                turn,
                ours.first_s - ours.sent_s,
                without.first_s - without.sent_s,
                ours.end_s - ours.sent_s,
                without.end_s - without.sent_s,
            )
    switch.turn(on=True)
    for on, name in names.items():
        if (found := num_recorded(server, name)) != (num_turns if on else 0):
            raise WrongSwitchError(f"{found} turns of {name} were recorded, of {num_turns}")


def num_recorded(server: Server, session: str) -> int:
    """The number of turns that the server remembers of a session."""
    answer = httpx.get(f"{server.url}/v1/sessions/{session}/turns", params={"limit": 200})
    return len(answer.json()["turns"]) if answer.is_success else 0


def median_ratio(pairs: Sequence[Pair], name: str) -> str:
    """The median of with / without, and the range of resampled medians."""
    by_round: dict[int, list[float]] = {}
    for pair in pairs:
        ratio = getattr(pair, f"{name}_s") / getattr(pair, f"{name}_without_s")
        by_round.setdefault(pair.round, []).append(ratio)
    rounds = list(by_round.values())
    random = Random(0)
    medians = []
    for _ in range(RESAMPLES):
        chosen = random.choices(rounds, k=len(rounds))
        resampled = [random.choices(ratios, k=len(ratios)) for ratios in chosen]
        medians.append(percentile([ratio for ratios in resampled for ratio in ratios], 0.5))
    low, high = percentile(medians, 0.025), percentile(medians, 0.975)
    middle = percentile([ratio for ratios in rounds for ratio in ratios], 0.5)
    return f"{middle:.4f} ({low:.4f} to {high:.4f})"


def row(pairs: Sequence[Pair]) -> list[str]:
    """One line of the table."""
    first = percentile([1000 * pair.first_without_s for pair in pairs], 0.5)
    total = percentile([1000 * pair.total_without_s for pair in pairs], 0.5)
    return [
        f"{pairs[0].context:,}",
        f"{len(pairs)}",
        f"{first:.1f} ms",
        median_ratio(pairs, "first"),
        f"{total:.1f} ms",
        median_ratio(pairs, "total"),
    ]


def main() -> int:
    """Measure, print, write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--contexts", default="2000,20000", help="tokens (%(default)s)")
    parser.add_argument(
        "--turns", type=int, default=30, help="of each context and round (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="of each context (%(default)s)")
    out = ROOT / "benchmarks" / "serving" / "results" / "records.json"
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--logs", type=Path, default=ROOT / "out" / "serving" / "records")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # stops the server too
    model = ensure_tiny(
        CACHE / "tiny-llama-262k", layers=1, heads=1, kv_heads=1, max_len=MAX_MODEL_LEN
    )
    count = replay.Tokens(model).count
    args.logs.mkdir(parents=True, exist_ok=True)
    switch = Switch(args.logs / "switch", is_new=True)
    launcher = ("benchmarks.serving.switched_server", str(args.logs / "switch"))
    settings = Settings(launchers={PLUGIN: launcher})
    pairs: list[Pair] = []
    try:
        with running_servers(model, args.logs, print, settings=settings, sides=(PLUGIN,)) as all_:
            for number in range(args.rounds):
                for context in map(int, args.contexts.split(",")):
                    pairs += play(all_[PLUGIN], switch, number, context, args.turns, count)
                print(f"round {number}: played", flush=True)
    except (ServerFailedError, WrongSwitchError) as error:
        print(error, file=sys.stderr)
        return 1
    head = ["context", "pairs", "first token without", "with / without"]
    head += ["turn without", "with / without"]
    contexts = dict.fromkeys(pair.context for pair in pairs)
    print(markdown(head, [row([p for p in pairs if p.context == each]) for each in contexts]))
    command = f"python -m benchmarks.serving.bench_records {shlex.join(sys.argv[1:])}".strip()
    save(args.out, machine.describe() | {"command": command}, pairs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
