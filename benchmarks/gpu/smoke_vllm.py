# SPDX-License-Identifier: Apache-2.0
"""Three sessions of six turns through vLLM with dummy weights, stock against plugin.

    python -m benchmarks.gpu.smoke_vllm [--shape llama-8b|tiny] [--only NAME;...] [--seconds 300]

Each configuration is a process of its own, what matters most first; one checks the plugin's
invariants after every step, which takes time for every block of the cache. No tokenizer is
needed. Works on a CPU too (--shape tiny).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.models.dummy import SHAPES, write_config

MOST_SECONDS = 240  # of one configuration
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


def play(folder: Path, num_tokens: int) -> dict[str, Any]:
    """All turns; random text, greedy answers."""
    from vllm import LLM

    from vllm_stateful.adapters.attention_choice import STEPS

    began = time.perf_counter()
    llm = LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager="SMOKE_EAGER" in os.environ,
        max_model_len=8192,
        gpu_memory_utilization=0.6,
        kv_cache_dtype=os.environ.get("SMOKE_KV_CACHE", "auto"),
        speculative_config=json.loads(os.environ.get("SMOKE_DRAFTS", "null")),
        seed=0,
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


def run(name: str, shape: str, folder: Path, seconds: float) -> dict[str, Any] | str:
    """One configuration in its own process: what it played, or the end of what it said."""
    out = folder / "played.json"
    out.unlink(missing_ok=True)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **CONFIGURATIONS[name]}
    command = [sys.executable, "-m", "benchmarks.gpu.smoke_vllm", "--shape", shape]
    said = folder / "said.txt"
    with said.open("w") as log:
        try:
            done = subprocess.run(
                [*command, "--play", str(folder)],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return said.read_text()[-3000:] + f"\nended after {seconds:.0f} s"
    if done.returncode or not out.exists():
        return said.read_text()[-3000:]
    return dict(json.loads(out.read_text()))


def row(name: str, played: dict[str, Any], stock: dict[str, Any] | None) -> str:
    """Tokens computed, the median of the later turns, how many answers equal stock's, and steps
    that our kernels attended in."""
    turns = played["turns"]
    later = sorted(turn["seconds"] for turn in turns[SESSIONS:])
    computed = sum(turn["prompt"] - turn["cached"] for turn in turns)
    equal = ""
    if stock is not None:
        pairs = zip(turns, stock["turns"], strict=True)
        equal = f"{sum(a['answer'] == b['answer'] for a, b in pairs)} of {len(turns)}"
    median = later[len(later) // 2] * 1000
    start = f"{played['runner']} | {played['start_s']:.0f}"
    return f"| {name} | {start} | {computed} | {median:.1f} | {equal} | {played['ours']} |"


def main() -> int:
    """Run the configurations and print a table; 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--only", default=";".join(CONFIGURATIONS))
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="none begins that may end after them"
    )
    parser.add_argument("--play", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.play:
        played = play(args.play, SHAPES[args.shape]["vocab_size"])
        (args.play / "played.json").write_text(json.dumps(played))
        return 0
    lines = ["| configuration | runner | start (s) | computed | later turns (ms) | equal | ours |"]
    lines.append("|---|---|---|---|---|---|---|")
    failed, longest = 0, 0.0
    stocks: dict[str, dict[str, Any]] = {}
    until = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_config(folder, args.shape)
        for name in args.only.split(";"):
            began = time.monotonic()
            if began + longest > until:
                lines.append(f"| {name} | not played, time was up | | | | | |")
                continue
            played = run(name, args.shape, folder, min(until - began, MOST_SECONDS))
            longest = max(longest, time.monotonic() - began)
            if isinstance(played, str):
                failed += 1
                lines.append(f"| {name} | failed | | | | | |")
                print(f"--- {name}\n{played}\n---", flush=True)
                continue
            stocks |= {name: played} if of_stock(name) == name else {}
            lines.append(row(name, played, stocks.get(of_stock(name))))
            if problem := is_wrong(name, played):
                failed += 1
                lines[-1] += f" {problem} |"
            print(lines[-1], flush=True)
    print("\n".join(["", *lines]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
