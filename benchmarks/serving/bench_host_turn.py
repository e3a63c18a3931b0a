# SPDX-License-Identifier: Apache-2.0
"""What one turn of a long conversation costs the API server, stage by stage, without a server.

    python -m benchmarks.serving.bench_host_turn [--messages 400] [--tokens 150000] [--tools 30]

Each side runs in a process of its own, in turns of the same conversation: vLLM's own route field,
renderer, input processor, detokenizer and encoder, from the bytes of the body to the bytes for the
engine core. There is no HTTP, no engine and no model. With the plugin the response cache is on and
there are two engine cores to choose from, so that both are seen; no share of the turns is verified.
Prints medians in microseconds: the CPU time of the process, all threads together. Stages that stand
further right are parts of the one above.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from random import Random
from statistics import median
from typing import Any

from tokenizers import Tokenizer

from benchmarks.models import CACHE
from benchmarks.models.tiny import ensure_tiny
from benchmarks.serving import conversation

STOCK, PLUGIN = "stock", "plugin"
MAX_LEN = 262144
TURN_TOKENS = 700
OPTIONS = {
    "VLLM_STATEFUL": "1",
    "VLLM_STATEFUL_VERIFY_TOKENS": "0",
    "VLLM_STATEFUL_RESPONSE_CACHE_BYTES": "64M",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--messages", type=int, default=400, help="of the history (%(default)s)")
    add("--tokens", type=int, default=150_000, help="of the history (%(default)s)")
    add("--tools", type=int, default=30, help="of each request (%(default)s)")
    add("--turns", type=int, default=30, help="measured, after three others (%(default)s)")
    add("--side", choices=(STOCK, PLUGIN), help="only this one, in this process, as JSON")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    if args.side is not None:
        from benchmarks.serving.host_turn_stages import HostPath

        print(json.dumps(HostPath(model()).measure(bodies(args))))
        return 0
    found = {side: _run(side, args) for side in (STOCK, PLUGIN)}
    print(f"{'stage':<44}{STOCK:>10}{PLUGIN:>10}")
    for name in dict.fromkeys([*found[STOCK], *found[PLUGIN]]):
        cells = [f"{found[side][name]:.0f}" if name in found[side] else "-" for side in found]
        print(f"{name:<44}{cells[0]:>10}{cells[1]:>10}")
    return 0


def _run(side: str, args: argparse.Namespace) -> dict[str, float]:
    numbers = (
        f"--{each}={getattr(args, each)}" for each in ("messages", "tokens", "tools", "turns")
    )
    command = [sys.executable, "-m", "benchmarks.serving.bench_host_turn", "--side", side, *numbers]
    options = OPTIONS if side == PLUGIN else {}
    others = {key: value for key, value in os.environ.items() if key not in OPTIONS}
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", **others, **options}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    measured = rows[-args.turns :]
    return {name: median(row[name] for row in measured) for name in measured[-1]}


def model() -> str:
    folder = CACHE / "tiny-llama-262k"
    return str(ensure_tiny(folder, layers=1, heads=1, kv_heads=1, max_len=MAX_LEN))


def bodies(args: argparse.Namespace) -> Iterator[bytes]:
    """The request of each turn: each adds a call, its result, an answer and a question."""
    tokenizer = Tokenizer.from_file(f"{model()}/tokenizer.json")

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    random = Random(7)
    share = args.tokens // args.messages - conversation.TEMPLATE_TOKENS
    lengths = {"assistant": 40, "tool": 2 * share - 40}
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Use the tools."}]
    while len(messages) < args.messages:
        messages.append(_message(random, len(messages), lengths, share, count))
    tools = [_tool(random, number) for number in range(args.tools)]
    lengths = {"assistant": 40, "tool": TURN_TOKENS // 2}
    for _ in range(args.turns + 3):
        body = {
            "model": "tiny",
            "messages": messages,
            "tools": tools,
            "stream": True,
            "temperature": 0,
            "max_tokens": 64,
            "session_id": "a-session-of-its-own",
        }
        yield json.dumps(body).encode()
        for _ in range(4):
            messages.append(_message(random, len(messages), lengths, TURN_TOKENS // 4, count))


def _message(
    random: Random, place: int, lengths: dict[str, int], share: int, count: conversation.Count
) -> dict[str, Any]:
    match place % 4:
        case 1:
            return {"role": "user", "content": conversation.text(random, share, count)}
        case 2:
            arguments = json.dumps({"path": f"/src/{random.random()}.py", "line": place})
            function = {"name": f"tool_{place % 7}", "arguments": arguments}
            call = {"id": f"call_{place}", "type": "function", "function": function}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        case 3:
            text = conversation.text(random, lengths["tool"], count)
            return {"role": "tool", "tool_call_id": f"call_{place - 1}", "content": text}
    return {"role": "assistant", "content": conversation.text(random, share, count)}


def _tool(random: Random, number: int) -> dict[str, Any]:
    """About 250 tokens, as coding agents have."""
    fields = {
        f"field_{place}": {"type": "string", "description": conversation.sentence(random)}
        for place in range(6)
    }
    parameters = {"type": "object", "properties": fields, "required": ["field_0", "field_1"]}
    about = " ".join(conversation.sentence(random) for _ in range(3))
    function = {"name": f"tool_{number}", "description": about, "parameters": parameters}
    return {"type": "function", "function": function}


if __name__ == "__main__":
    sys.exit(main())
