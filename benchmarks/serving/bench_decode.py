# SPDX-License-Identifier: Apache-2.0
"""Time per generated token against the length of the conversation, streamed, with tools.

    python -m benchmarks.serving.bench_decode [--contexts 1000,27000,60000,150000] [--rounds 6]

Stock vLLM and vLLM with the plugin run side by side on a one-layer model with a 262k context, in
bfloat16, whose step costs little: what is left is what each token costs the host. Both get the same
requests in turn, another one first each time, and each waits until the other's worker has gone to
sleep. A change must not make the ratio at any length worse than one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.models import CACHE, ROOT, TOOLS_TEMPLATE
from benchmarks.models.tiny import ensure_tiny
from benchmarks.ports import HOST
from benchmarks.serving import conversation
from benchmarks.serving.client import ChatClient, encode_body
from benchmarks.serving.servers import (
    MAX_MODEL_LEN,
    MODEL_NAME,
    PLUGIN,
    SIDES,
    STOCK,
    Settings,
    running_servers,
)

PAUSE_S = 1.3  # a CPU worker spins for one second after each request
CONTEXTS = "1000,27000,60000,150000"
TOOL = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Run a command.",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}},
    },
}
SETTINGS = Settings(
    dtype="bfloat16",
    arguments=(
        *("--max-num-batched-tokens", "8192", "--chat-template", str(TOOLS_TEMPLATE)),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ),
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--contexts", default=CONTEXTS, help="tokens of history (%(default)s)")
    add("--rounds", type=int, default=6, help="answers of each side and length (%(default)s)")
    add("--tokens", type=int, default=192, help="of each answer (%(default)s)")
    add("--dtype", default="bfloat16", help="(%(default)s)")
    add("--plugin-arguments", default="", help="more for the side with the plugin")
    add("--out", type=Path, default=ROOT / "out" / "decode", help="logs and rows (%(default)s)")
    args = parser.parse_args()
    args.contexts = [int(part) for part in args.contexts.split(",")]
    return args


def say(text: str) -> None:
    print(text, flush=True)


def measure(args: argparse.Namespace, model: Path) -> dict[tuple[str, int], list[float]]:
    """Milliseconds per token, by side and context."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    settings = Settings(
        dtype=args.dtype,
        arguments=SETTINGS.arguments,
        side_arguments={PLUGIN: tuple(args.plugin_arguments.split())},
    )
    found: dict[tuple[str, int], list[float]] = {}
    with running_servers(model, args.out, say, is_timed=False, settings=settings) as servers:
        clients = {side: ChatClient(HOST, server.port) for side, server in servers.items()}
        for context in args.contexts:
            history = conversation.history(context, context, 40, count)
            for number in range(-1, args.rounds):
                order = SIDES if number % 2 else SIDES[::-1]
                messages = [*history, {"role": "user", "content": f"Question {number}. Go on."}]
                body = encode_body(MODEL_NAME, messages, args.tokens, tools=[TOOL], ignore_eos=True)
                for side in order:
                    time.sleep(PAUSE_S)
                    reply = clients[side].ask(body)
                    if number >= 0:  # the first one is cold
                        spent = (reply.end_s - reply.first_s) / (reply.num_answer_tokens - 1)
                        found.setdefault((side, context), []).append(spent * 1000)
            say(line(context, found))
    return found


def line(context: int, found: dict[tuple[str, int], list[float]]) -> str:
    """One row of the table."""
    stock, plugin = found[STOCK, context], found[PLUGIN, context]
    pairs = median(b / a for a, b in zip(stock, plugin, strict=True))
    return (
        f"| {context} | {median(stock):.2f} | {median(plugin):.2f} | "
        f"{median(plugin) / median(stock):.3f} | {pairs:.3f} |"
    )


def main() -> int:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    heads = ("context", "stock (ms a token)", "plugin", "plugin / stock", "median of the pairs")
    say(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    folder = CACHE / "tiny-llama-262k"
    found = measure(args, ensure_tiny(folder, layers=1, heads=1, kv_heads=1, max_len=MAX_MODEL_LEN))
    rows = [
        {"side": side, "context": context, "ms_a_token": [round(each, 4) for each in values]}
        for (side, context), values in found.items()
    ]
    (args.out / "decode.json").write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
