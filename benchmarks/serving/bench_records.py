# SPDX-License-Identifier: Apache-2.0
"""What the records of turns cost: time to first token and whole turn, with them and without.

    python -m benchmarks.serving.bench_records [--contexts 2000,20000] [--turns 30] [--starts 4]

Two servers with the plugin run a one-layer model, one of them with ``--stateful-explain off``. Both
get the same turns, and each turn begins with the other server. Two servers that are started alike
differ by some percent for as long as they live. So they are started several times, each time in
the other order. What is told is the median of the ratios turn by turn, of each start and of all,
and the range in which 95% of the medians lie when starts, and turns in them, are resampled.
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
    NO_RECORDS,
    PLUGIN,
    Server,
    running_servers,
)
from benchmarks.serving.tables import markdown, percentile, save

SIDES = (PLUGIN, NO_RECORDS)
MAX_TOKENS = 8
DELTA_TOKENS = 170
NUM_MESSAGES = 9
NUM_WARM_TURNS = 2
PAUSE_S = 1.3
"""A CPU worker spins for one second after each request."""
RESAMPLES = 2000


@dataclass
class Pair:
    """One turn on both sides: seconds to the first token, and to the end."""

    start: int
    context: int
    turn: int
    first_s: float
    first_without_s: float
    total_s: float
    total_without_s: float


def play(
    servers: dict[str, Server], start: int, context: int, num_turns: int, count: Count
) -> Iterator[Pair]:
    """One conversation on both servers."""
    clients = {side: ChatClient(HOST, server.port) for side, server in servers.items()}
    first = conversation.history(context, context, NUM_MESSAGES, count)
    turns = conversation.turns(context, first, NUM_WARM_TURNS + num_turns, DELTA_TOKENS, count)
    for turn, messages in enumerate(turns):
        body = encode_body(MODEL_NAME, messages, MAX_TOKENS)
        replies: dict[str, Reply] = {}
        for side in SIDES if turn % 2 else SIDES[::-1]:
            time.sleep(PAUSE_S)
            replies[side] = clients[side].ask(body)
        if turn >= NUM_WARM_TURNS:
            ours, without = (replies[side] for side in SIDES)
            yield Pair(
                start,
                context,
                turn,
                ours.first_s - ours.sent_s,
                without.first_s - without.sent_s,
                ours.end_s - ours.sent_s,
                without.end_s - without.sent_s,
            )


def median_ratio(pairs: Sequence[Pair], name: str) -> str:
    """The median of with / without, the range of resampled medians, and that of each start."""
    by_start: dict[int, list[float]] = {}
    for pair in pairs:
        ratio = getattr(pair, f"{name}_s") / getattr(pair, f"{name}_without_s")
        by_start.setdefault(pair.start, []).append(ratio)
    starts = list(by_start.values())
    random = Random(0)
    medians = []
    for _ in range(RESAMPLES):
        chosen = random.choices(starts, k=len(starts))
        resampled = [random.choices(ratios, k=len(ratios)) for ratios in chosen]
        medians.append(percentile([ratio for ratios in resampled for ratio in ratios], 0.5))
    low, high = percentile(medians, 0.025), percentile(medians, 0.975)
    middle = percentile([ratio for ratios in starts for ratio in ratios], 0.5)
    each = ", ".join(f"{percentile(ratios, 0.5):.3f}" for ratios in starts)
    return f"{middle:.3f} ({low:.3f} to {high:.3f}); {each}"


def row(pairs: Sequence[Pair]) -> list[str]:
    """One line of the table."""
    first = percentile([1000 * pair.first_without_s for pair in pairs], 0.5)
    total = percentile([1000 * pair.total_without_s for pair in pairs], 0.5)
    return [
        f"{pairs[0].context:,}",
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
        "--turns", type=int, default=30, help="of each context and start (%(default)s)"
    )
    parser.add_argument("--starts", type=int, default=4, help="of both servers (%(default)s)")
    out = ROOT / "benchmarks" / "serving" / "results" / "records.json"
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--logs", type=Path, default=ROOT / "out" / "serving" / "records")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # stops the servers too
    model = ensure_tiny(
        CACHE / "tiny-llama-262k", layers=1, heads=1, kv_heads=1, max_len=MAX_MODEL_LEN
    )
    count = replay.Tokens(model).count
    pairs: list[Pair] = []
    try:
        for start in range(args.starts):
            sides = SIDES if start % 2 else SIDES[::-1]
            with running_servers(model, args.logs, print, sides=sides) as servers:
                for context in map(int, args.contexts.split(",")):
                    pairs += play(servers, start, context, args.turns, count)
                    print(f"start {start}, {context} tokens: played", flush=True)
    except ServerFailedError as error:
        print(error, file=sys.stderr)
        return 1
    head = ["context", "first token without", "with / without", "turn without", "with / without"]
    contexts = dict.fromkeys(pair.context for pair in pairs)
    print(markdown(head, [row([p for p in pairs if p.context == each]) for each in contexts]))
    command = f"python -m benchmarks.serving.bench_records {shlex.join(sys.argv[1:])}".strip()
    save(args.out, machine.describe() | {"command": command}, pairs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
