# SPDX-License-Identifier: Apache-2.0
"""Three sessions of six turns through vLLM with dummy weights: are the answers those of stock?

    python -m benchmarks.gpu.smoke_vllm [--shape llama-8b|tiny] [--layers 8] [--only NAME;...]
        [--side-by-side 4] [--seconds 300] [--out FILE]
    python -m benchmarks.gpu.smoke_vllm --tables FILE

Each configuration is a process of its own with a time limit, what matters most first; one checks
the plugin's invariants after every step. What it played is in FILE as soon as it ended. Beside
each other they say nothing of how fast they are. No tokenizer is needed. Works on a CPU too
(--shape tiny).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.gpu.limited import append_row, read_rows, run_limited
from benchmarks.gpu.serving_sides import bytes_of_token
from benchmarks.models.dummy import SHAPES, write_config

MOST_SECONDS = 150  # of one configuration
CACHE_TOKENS, GRAPH_SIZES = 24576, (1, 2, 4, 9, 18, 27)
SESSIONS, TURNS, FIRST_TOKENS, ADDED_TOKENS, ANSWER_TOKENS = 3, 6, 2000, 300, 32
PLUGIN = {"VLLM_STATEFUL": "1", "VLLM_STATEFUL_STRICT": "1"}
V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
EAGER = {"SMOKE_EAGER": "1"}
FP8 = {"SMOKE_KV_CACHE": "fp8"}
DRAFTS = {"SMOKE_DRAFTS": '{"method": "ngram_gpu", "num_speculative_tokens": 8}'}
ADAPTIVE = {"SMOKE_DRAFTS": DRAFTS["SMOKE_DRAFTS"][:-1] + ', "enable_adaptive_verification": true}'}
FEW = {"SMOKE_DRAFTS": '{"method": "ngram_gpu", "num_speculative_tokens": 3}'}
ATTENTION = {**PLUGIN, "VLLM_STATEFUL_ATTENTION": "on"}
TOGETHER = {"SMOKE_TOGETHER": "1"}
CONFIGURATIONS: dict[str, dict[str, str]] = {
    "stock": {},
    "plugin": PLUGIN,
    "plugin+attention": ATTENTION,
    "plugin, checked": {**PLUGIN, "VLLM_STATEFUL_CHECK_INVARIANTS": "1"},
    "stock+ngram_gpu": DRAFTS,
    "plugin+drafts": {**PLUGIN, **DRAFTS},
    "plugin+drafts+attention": {**ATTENTION, **DRAFTS},
    "stock, agents together": TOGETHER,
    "plugin+few drafts+attention, agents together": {**ATTENTION, **FEW, **EAGER, **TOGETHER},
    "stock, fp8": FP8,
    "plugin+drafts+attention, fp8": {**ATTENTION, **DRAFTS, **FP8},
    "plugin+adaptive": {**PLUGIN, **ADAPTIVE},
    "stock-v1": V1,
    "plugin-v1": {**V1, **PLUGIN},
    "plugin-eager": {**PLUGIN, **EAGER},
}
"""What each adds to the environment. Answers are compared with the last stock that played the same
turns over the same cache."""


def play(folder: Path, num_tokens: int, cache_bytes: int) -> dict[str, Any]:
    """All turns; random text, greedy answers."""
    from vllm import LLM
    from vllm.platforms import current_platform

    from vllm_stateful.adapters.attention_choice import STEPS

    began = time.perf_counter()
    # The share of the memory is asked for at the start only, when others may have theirs already.
    on_gpu = {
        "kv_cache_memory_bytes": cache_bytes,
        "gpu_memory_utilization": 0.05,
        "compilation_config": {"cudagraph_capture_sizes": list(GRAPH_SIZES)},
        "enforce_eager": "SMOKE_EAGER" in os.environ,
    }
    llm = LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=8192,
        kv_cache_dtype=os.environ.get("SMOKE_KV_CACHE", "auto"),
        speculative_config=json.loads(os.environ.get("SMOKE_DRAFTS", "null")),
        seed=0,
        **(on_gpu if current_platform.is_cuda() else {"dtype": "float32", "enforce_eager": True}),
    )
    started = time.perf_counter() - began
    turns = list(play_turns(llm, num_tokens))
    is_v2 = llm.llm_engine.vllm_config.use_v2_model_runner
    return {
        "start_s": started,
        "runner": "V2" if is_v2 else "V1",
        "turns": turns,
        "ours": STEPS["taken"],
    }


def play_turns(llm: Any, num_tokens: int) -> Iterator[dict[str, Any]]:
    """Session after session in each turn, or all of a turn at once, with one beginning."""
    from vllm import SamplingParams

    random, is_together = Random(0), "SMOKE_TOGETHER" in os.environ
    begin = text(random, num_tokens, FIRST_TOKENS if is_together else 0)
    histories = [list(begin) for _ in range(SESSIONS)]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=ANSWER_TOKENS,
            ignore_eos=True,
            detokenize=False,
            extra_args={"session_id": f"smoke-session-{session}"},
        )
        for session in range(SESSIONS)
    ]
    every = list(range(SESSIONS))
    for turn in range(TURNS):
        for history in histories:
            is_first = turn == 0 and not is_together
            history += text(random, num_tokens, FIRST_TOKENS if is_first else ADDED_TOKENS)
        for asked in [every] if is_together else [[session] for session in every]:
            began = time.perf_counter()
            prompts = [{"prompt_token_ids": list(histories[session])} for session in asked]
            answers = llm.generate(prompts, [params[session] for session in asked], use_tqdm=False)
            seconds = time.perf_counter() - began
            for session, answer in zip(asked, answers, strict=True):
                tokens = list(answer.outputs[0].token_ids)
                yield {
                    "seconds": seconds,
                    "prompt": len(histories[session]),
                    "cached": answer.num_cached_tokens or 0,
                    "answer": tokens,
                }
                histories[session] += tokens


def text(random: Random, num_tokens: int, length: int) -> list[int]:
    """Random tokens."""
    return [random.randrange(3, num_tokens) for _ in range(length)]


def is_wrong(name: str, played: dict[str, Any]) -> str:
    """What a configuration that ended well did not show; empty: nothing."""
    is_asked = CONFIGURATIONS[name].get("VLLM_STATEFUL_ATTENTION") == "on"
    return "our kernels served no step" if is_asked and not played["ours"] else ""


def of_stock(name: str) -> str:
    """The configuration of stock that plays the same turns over the same cache."""
    kept = {k: v for k, v in CONFIGURATIONS[name].items() if k in TOGETHER or k in FP8}
    return next(stock for stock, added in CONFIGURATIONS.items() if added == kept)


def run(name: str, args: argparse.Namespace, until: float) -> dict[str, Any]:
    """One configuration in its own process: what it played, or why it did not."""
    left = until - time.monotonic()
    if left <= 0:
        return {"name": name, "failed": "not played, time was up"}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        layers = {"num_hidden_layers": args.layers} if args.layers else {}
        write_config(folder, args.shape, **layers)
        command = [sys.executable, "-m", "benchmarks.gpu.smoke_vllm", "--shape", args.shape]
        command += ["--play", str(folder)]
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CACHE_ROOT": str(folder / "cache"),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            **CONFIGURATIONS[name],
        }
        began = time.monotonic()
        problem = run_limited(command, min(left, args.each), folder / "said.txt", environment)
        row = {"name": name, "wall_s": time.monotonic() - began}
        if problem:
            return {**row, "failed": problem}
        row |= json.loads((folder / "played.json").read_text())
        wrong = is_wrong(name, row)
        return {**row, "failed": wrong} if wrong else row


def line(row: dict[str, Any], stock: dict[str, Any] | None) -> str:
    """Tokens computed, the median of the later turns, how many answers equal stock's, and steps
    that our kernels attended in."""
    if "turns" not in row:
        return f"| {row['name']} | failed | | | | | |"
    turns = row["turns"]
    later = sorted(turn["seconds"] for turn in turns[SESSIONS:])
    computed = sum(turn["prompt"] - turn["cached"] for turn in turns)
    equal = ""
    if stock is not None:
        pairs = zip(turns, stock["turns"], strict=True)
        equal = f"{sum(a['answer'] == b['answer'] for a, b in pairs)} of {len(turns)}"
    median = later[len(later) // 2] * 1000
    start = f"{row['runner']} | {row['start_s']:.0f}"
    return f"| {row['name']} | {start} | {computed} | {median:.1f} | {equal} | {row['ours']} |"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each configuration, in their order, and the end of what failed."""
    played = {row["name"]: row for row in rows if "turns" in row}
    order = list(CONFIGURATIONS)
    made = ["| configuration | runner | start (s) | computed | later turns (ms) | equal | ours |"]
    made.append("|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: order.index(row["name"])):
        made.append(line(row, played.get(of_stock(row["name"]))))
    failed = [f"--- {row['name']}: {row['failed']}" for row in rows if "failed" in row]
    return "\n".join([*failed, "", *made])


def is_right(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether all played, and answered as stock where stock played."""
    played = {row["name"]: row for row in rows if "turns" in row}
    for name, row in played.items():
        stock = played.get(of_stock(name), row)
        pairs = zip(row["turns"], stock["turns"], strict=True)
        if not all(a["answer"] == b["answer"] for a, b in pairs):
            return False
    return bool(rows) and not any("failed" in row for row in rows)


def main() -> int:
    """Run the configurations and print a table; 1 when one failed or answered unlike stock."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llama-8b")
    add("--layers", type=int, help="instead of the shape's: 8 are enough where equality counts")
    add("--only", default=";".join(CONFIGURATIONS))
    add("--side-by-side", type=int, default=1, help="processes at once (%(default)s)")
    add("--seconds", type=float, default=1e6, help="of all together")
    add("--each", type=float, default=MOST_SECONDS, help="of each at most (%(default)s)")
    add("--out", type=Path, default=Path("out/smoke.jsonl"), help="(%(default)s)")
    add("--tables", type=Path, help="only print the table of such a file")
    add("--play", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.play:
        config = json.loads((args.play / "config.json").read_text())
        cache = CACHE_TOKENS * config["num_hidden_layers"] * bytes_of_token(args.shape)
        played = play(args.play, config["vocab_size"], cache)
        (args.play / "played.json").write_text(json.dumps(played))
        return 0
    if not args.tables:
        play_all(args)
    rows = list(read_rows(args.tables or args.out))
    print(table(rows))
    return 0 if is_right(rows) else 1


def play_all(args: argparse.Namespace) -> None:
    """So many at once; a row for each when it ends."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.unlink(missing_ok=True)

    def one(name: str) -> None:
        row = run(name, args, began + args.seconds - 1)
        append_row(args.out, row)
        said = row.get("failed", "played")[:200]
        print(f"[{time.monotonic() - began:.0f} s] {name}: {said}", flush=True)

    with ThreadPoolExecutor(args.side_by_side) as pool:
        list(pool.map(one, args.only.split(";")))


if __name__ == "__main__":
    sys.exit(main())
