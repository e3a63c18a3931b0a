# SPDX-License-Identifier: Apache-2.0
"""How much faster a request is the second time, with ``--stateful-response-cache-bytes``.

    python -m benchmarks.serving.bench_response_cache [--requests 5] [--tokens 64]

Each request is greedy, has a history of a thousand tokens and is asked twice; both are streamed.
"""

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from benchmarks.demo import machine
from benchmarks.demo.servers import ServerFailedError
from benchmarks.ports import HOST
from benchmarks.serving import conversation, replay
from benchmarks.serving.agents_play import PAUSE_S
from benchmarks.serving.bench_agents import BLOCK_SIZE
from benchmarks.serving.client import ChatClient, RequestFailedError, encode_body
from benchmarks.serving.conversation import Count
from benchmarks.serving.servers import PLUGIN, running_servers
from benchmarks.serving.tables import markdown, percentile, save

MAX_LEN = 2048
HISTORY_TOKENS, NUM_MESSAGES = 1000, 11


@dataclass
class Sample:
    """One request, asked twice."""

    first_s: float
    again_s: float
    again_first_text_s: float
    num_answer_tokens: int


def ask_twice(port: int, count: Count, number: int, num_tokens: int) -> Iterator[Sample]:
    """The same requests for the same arguments.

    Raises:
        RequestFailedError: the second answer is another one.
    """
    with ChatClient(HOST, port) as client:
        for seed in range(number):
            messages = conversation.history(seed, HISTORY_TOKENS, NUM_MESSAGES, count)
            body = encode_body(replay.MODEL_NAME, messages, num_tokens)
            first = client.ask(body)
            time.sleep(PAUSE_S)
            again = client.ask(body)
            if again.text != first.text:
                raise RequestFailedError("another answer the second time")
            yield Sample(
                first.end_s - first.sent_s,
                again.end_s - again.sent_s,
                again.first_text_s - again.sent_s,
                again.num_answer_tokens,
            )


def main() -> int:
    """Measure, print, write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    replay.add_options(parser, model=replay.SMOLLM2, out="response_cache.json")
    parser.add_argument("--requests", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # stops the server too
    model = replay.model_folder(args.model)
    count = replay.Tokens(model).count
    cache = ("--stateful-response-cache-bytes", "64M")
    settings = replay.settings(
        MAX_LEN, block_size=BLOCK_SIZE, cores=args.cores, side_arguments={PLUGIN: cache}
    )
    try:
        with running_servers(model, args.logs, print, settings=settings, sides=(PLUGIN,)) as server:
            samples = list(ask_twice(server[PLUGIN].port, count, args.requests + 1, args.tokens))
    except (ServerFailedError, RequestFailedError) as error:
        print(error, file=sys.stderr)
        return 1
    del samples[0]  # warm-up
    medians = {
        name: percentile([asdict(sample)[name] for sample in samples], 0.5)
        for name in ("first_s", "again_s", "again_first_text_s")
    }
    ratios = [sample.first_s / sample.again_s for sample in samples]
    head = ["first (s)", "again (s)", "its first text (s)", "times faster: median (least)"]
    line = [f"{value:.4f}" for value in medians.values()]
    line.append(f"{percentile(ratios, 0.5):.0f} ({min(ratios):.0f})")
    text = markdown(head, [line])
    print(f"\n{text}")
    command = f"python -m benchmarks.serving.bench_response_cache {shlex.join(sys.argv[1:])}"
    about = machine.describe() | {"command": command.strip(), "options": replay.written(args)}
    save(args.out, about | {"table": text.splitlines()}, samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
