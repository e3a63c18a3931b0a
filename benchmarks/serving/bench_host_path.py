# SPDX-License-Identifier: Apache-2.0
"""Time to first token of a chat turn against the length of its conversation.

    python -m benchmarks.serving.bench_host_path [--quick]

Stock vLLM and vLLM with the plugin run side by side on a one-layer model with a 262k context, whose
attention costs little, and get the same requests, stock and plugin alternating. Each conversation
is played once unmeasured (cold), then one turn to warm up, then the measured turns, and then a few
turns with the event-loop probe on. Both sides run under `timed_server`, which says where the time
went.
"""

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.demo import machine
from benchmarks.demo.servers import ServerFailedError
from benchmarks.models import CACHE, ROOT
from benchmarks.models.tiny import ensure_tiny
from benchmarks.ports import HOST
from benchmarks.serving import conversation, report
from benchmarks.serving.client import ChatClient, Reply, RequestFailedError, encode_body
from benchmarks.serving.plot import save_plot
from benchmarks.serving.report import MEASURED, PROBED, Sample
from benchmarks.serving.servers import MAX_MODEL_LEN, MODEL_NAME, SIDES, Server, running_servers
from benchmarks.serving.stages import (
    ATTENTION,
    LOOP_BLOCKED,
    LOOP_WORK,
    Window,
    longest,
    read_records,
    stage_times,
)

MAX_TOKENS = 4
PAUSE_S = 1.3  # a CPU worker spins for one second after each request
NUM_WARM_TURNS = 2  # the cold one, and one more
TURN_EXTRA_TOKENS = 60  # an answer and the template around both messages
SPARE_TOKENS = 64
CONTEXTS = [1000, 2000, 5000, 10000, 20000, 50000, 75000, 106000, 150000, 180000]
QUICK = {"contexts": [2000, 20000], "messages": [1], "turns": 4}

Asked = tuple[Sample, Window]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, with the values of `--quick` filled in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--contexts", type=_numbers, default=CONTEXTS, help="tokens of history")
    parser.add_argument("--messages", type=_numbers, default=[1, 400], help="messages of history")
    parser.add_argument("--turns", type=int, default=12, help="measured turns (%(default)s)")
    parser.add_argument("--probe-turns", type=int, default=3, help="turns with the probe on")
    parser.add_argument("--delta", type=int, default=170, help="new tokens a turn (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "serving" / "results")
    parser.add_argument("--logs", type=Path, default=ROOT / "out" / "serving")
    parser.add_argument("--no-stages", action="store_true", help="servers without any timer")
    parser.add_argument("--quick", action="store_true", help="two contexts, four turns")
    args = parser.parse_args(arguments)
    if args.quick:
        vars(args).update(QUICK)
    if args.no_stages:
        args.probe_turns = 0
    if args.turns < 1:
        parser.error("at least one turn has to be measured")
    largest = max(args.contexts) + num_turns(args) * (args.delta + TURN_EXTRA_TOKENS)
    if largest + SPARE_TOKENS > MAX_MODEL_LEN:
        parser.error(f"a conversation would grow to {largest} tokens, beyond {MAX_MODEL_LEN}")
    return args


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def num_turns(args: argparse.Namespace) -> int:
    """All turns of a conversation."""
    return int(NUM_WARM_TURNS + args.turns + args.probe_turns)


class Player:
    """Plays conversations to both servers in turn."""

    def __init__(
        self,
        servers: dict[str, Server],
        clients: dict[str, ChatClient],
        args: argparse.Namespace,
        count: conversation.Count,
    ) -> None:
        self._servers = servers
        self._clients = clients
        self._args = args
        self._count = count

    def play(self, num_messages: int, context: int) -> list[Asked]:
        """The measured and the probed turns of one conversation, side after side."""
        args, seed = self._args, context * 1000 + num_messages
        first = conversation.history(seed, context, num_messages, self._count)
        turns = conversation.turns(seed, first, num_turns(args), args.delta, self._count)
        asked: list[Asked] = []
        for turn, messages in enumerate(turns):
            is_probed = turn >= NUM_WARM_TURNS + args.turns
            body = encode_body(MODEL_NAME, messages, MAX_TOKENS)
            replies = {side: self._ask(side, body, is_probed=is_probed) for side in SIDES}
            if turn < NUM_WARM_TURNS:
                continue
            kind = PROBED if is_probed else MEASURED
            for side, reply in replies.items():
                sample = _sample(reply, side, num_messages, context, turn, kind)
                asked.append((sample, _window(reply)))
        return asked

    def _ask(self, side: str, body: bytes, *, is_probed: bool) -> Reply:
        server, client = self._servers[side], self._clients[side]
        time.sleep(PAUSE_S)
        try:
            if not is_probed:
                return client.ask(body)
            with server.probed_loop():
                time.sleep(0.05)
                return client.ask(body)
        except (OSError, RequestFailedError) as error:
            raise ServerFailedError(server.report(f"a request failed ({error})")) from error


def _window(reply: Reply) -> Window:
    return Window(reply.sent_s, reply.first_s, reply.end_s, reply.num_answer_tokens)


def _sample(
    reply: Reply, side: str, num_messages: int, context: int, turn: int, kind: str
) -> Sample:
    return Sample(
        side,
        num_messages,
        context,
        turn,
        kind,
        reply.num_prompt_tokens,
        reply.num_cached_tokens,
        (reply.first_s - reply.sent_s) * 1000,
        (reply.first_text_s - reply.sent_s) * 1000,
        (reply.end_s - reply.sent_s) * 1000,
        reply.text,
    )


def add_stages(asked: Sequence[Asked], servers: dict[str, Server]) -> list[str]:
    """Fill in what the servers' timers wrote down; returns the targets that were not found."""
    lacking: list[str] = []
    for side, server in servers.items():
        records, missing = read_records(server.times)
        lacking += [f"{side}: no timer at {target}" for target in missing]
        for sample, window in asked:
            if sample.side != side:
                continue
            if sample.kind == PROBED:
                sample.block_ms = longest(LOOP_BLOCKED, records, window)
                sample.work_ms = longest(LOOP_WORK, records, window)
                continue
            sample.stages_ms = stage_times(records, window)
            if sample.stages_ms[ATTENTION]:
                sample.host_ms = sample.ttft_ms - sample.stages_ms[ATTENTION]
    return lacking


def measure(args: argparse.Namespace, model: Path) -> list[Asked]:
    """Play all conversations; the servers are stopped at the end."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    asked: list[Asked] = []

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    with running_servers(model, args.logs, say, is_timed=not args.no_stages) as servers:
        clients = {side: ChatClient(HOST, server.port) for side, server in servers.items()}
        player = Player(servers, clients, args, count)
        for num_messages in args.messages:
            for context in args.contexts:
                if not conversation.fits(context, num_messages):
                    say(f"{context} tokens in {num_messages} messages: left out, too few tokens")
                    continue
                start = time.monotonic()
                played = player.play(num_messages, context)
                asked += played
                _say_progress(played, time.monotonic() - start)
        if not args.no_stages:
            time.sleep(PAUSE_S)  # the timers write every half second
            for line in dict.fromkeys(add_stages(asked, servers)):
                say(line)
    return asked


def _say_progress(played: Sequence[Asked], elapsed_s: float) -> None:
    row = report.make_rows([sample for sample, _ in played])[0]
    times = ", ".join(f"{side} {row.ttft_ms[side]:.1f}" for side in SIDES)
    say(f"{row.context} tokens in {row.num_messages} messages: {times} ms, {elapsed_s:.0f} s")


def say(text: str) -> None:
    """One line of progress."""
    print(text, flush=True)


def main() -> int:
    """Measure, print the tables, write the files."""
    args = parse(sys.argv[1:])
    model = ensure_tiny(
        CACHE / "tiny-llama-262k", layers=1, heads=1, kv_heads=1, max_len=MAX_MODEL_LEN
    )
    command = f"python -m benchmarks.serving.bench_host_path {shlex.join(sys.argv[1:])}".strip()
    about = machine.describe() | {"command": command}
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # stops the servers too
    try:
        samples = [sample for sample, _ in measure(args, model)]
    except ServerFailedError as error:
        print(error, file=sys.stderr)
        return 1
    if not samples:
        print("nothing to measure", file=sys.stderr)
        return 1
    rows = report.make_rows(samples)
    tables = [report.ttft_table(rows, args.turns + args.probe_turns)]
    if not args.no_stages:
        tables += [report.stage_table(samples, *key) for key in report.stage_contexts(rows)]
        tables.append(report.loop_table(rows))
    for table in filter(None, tables):
        say(f"\n{table}")
    args.out.mkdir(parents=True, exist_ok=True)
    name = "host_path_quick" if args.quick else "host_path"
    options = {key: str(value) for key, value in vars(args).items() if key not in ("out", "logs")}
    report.save_json(args.out / f"{name}.json", {**about, "options": options}, rows, samples)
    save_plot(args.out / f"{name}.png", rows, about)
    say(f"\nwritten: {args.out / name}.json and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
