# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks on recorded conversations share: models, pinned answers, server settings."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.models import CACHE, ROOT, TOOLS_TEMPLATE, smollm2
from benchmarks.models.dummy import ensure_dummy
from benchmarks.models.tiny import ensure_tiny
from benchmarks.serving.recorded import SOURCES
from benchmarks.serving.servers import Settings

SMALL, SMOLLM2, LLAMA_8B = "small", "smollm2", "llama-8b"
MODELS = (SMALL, SMOLLM2, LLAMA_8B)
IDS, TEXT = "ids", "text"
PINS = (IDS, TEXT)

MODEL_NAME = "replay"
MAX_TOKENS = 8192
KV_GIB = 4
RESULTS = ROOT / "benchmarks" / "serving" / "results"
DEFAULT_BUDGET = "default"
INTEL_OPENMP = Path(sys.prefix) / "lib" / "libiomp5.so"
"""Comes with vLLM for CPUs, which wants it preloaded on x86: without it `ngram` on two cores is
slower than no drafts at all. All sides get it."""
_END = "<|im_end|>"


def model_folder(name: str) -> Path:
    """SmolLM2-135M, or random weights behind its tokenizer that compute a prompt 10 times faster.

    The small one is for loads: in four minutes one core computes 25,000 tokens with SmolLM2, which
    is no more than what a dozen live sessions hold.
    That of the shape of Llama-3.1-8B, with weights that vLLM makes up, is for a GPU.
    """
    if name == SMOLLM2:
        return smollm2.ensure()
    if name == LLAMA_8B:
        return ensure_dummy(name)
    path = CACHE / "small-llama-8k"
    return ensure_tiny(path, hidden=256, layers=6, heads=8, kv_heads=4, max_len=MAX_TOKENS)


class Tokens:
    """The token ids of texts; those seen before are not tokenized again."""

    def __init__(self, model: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._counts: dict[str, int] = {}

    def ids(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        if text not in self._counts:
            self._counts[text] = len(self.ids(text))
        return self._counts[text]

    def pinned(self, pin: str, answer: str) -> dict[str, Any]:
        """The fields of a request that make the model say this."""
        if pin == TEXT:
            return {"structured_outputs": {"choice": [answer]}}
        return {"vllm_xargs": {"pinned_ids": self.ids(answer + _END)}}


def settings(
    max_model_len: int,
    *,
    block_size: int,
    budget: str = DEFAULT_BUDGET,
    cores: str | None = None,
    num_blocks: int | None = None,
    threshold: int = 0,
    side_arguments: Mapping[str, tuple[str, ...]] | None = None,
    is_eager: bool = True,
    is_plain: bool = False,
) -> Settings:
    """What the servers have in common, and what one side has to itself.

    Args:
        max_model_len: the longest request, with its answer.
        block_size: tokens of a KV block.
        budget: most tokens of a step; vLLM's default is 2048 for a server on a CPU.
        cores: for each worker; vLLM's default leaves one core of two to the worker.
        num_blocks: size of the KV cache, where it is not the natural one.
        threshold: most tokens of one long prompt in a step, where others wait; 0 for no such limit.
        side_arguments: of `vllm serve`, for one side each.
        is_eager: without compiling the model.
        is_plain: with the OpenMP that a server gets if nobody sets anything, torch's own.
    """
    arguments = [
        *("--block-size", str(block_size)),
        *("--chat-template", str(TOOLS_TEMPLATE)),
        *("--worker-extension-cls", "benchmarks.serving.pinned_ids.PinnedIds"),
    ]
    if budget != DEFAULT_BUDGET:
        arguments += ["--max-num-batched-tokens", budget]
    if threshold:
        arguments += ["--long-prefill-token-threshold", str(threshold)]
    if num_blocks is not None:
        arguments += ["--num-gpu-blocks-override", str(num_blocks)]
    environment = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(ROOT)}
    if not is_plain:
        # Its OpenMP layer, with which `ngram` drafts, leaves the worker's own kernels one thread.
        environment["NUMBA_THREADING_LAYER"] = "workqueue"
    if cores:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = cores
    if INTEL_OPENMP.is_file() and not is_plain:
        environment["LD_PRELOAD"] = str(INTEL_OPENMP)
    return Settings(
        MODEL_NAME,
        max_model_len,
        tuple(arguments),
        KV_GIB,
        environment,
        side_arguments or {},
        is_eager,
    )


def on_gpu(common: Settings, num_sides: int, *, is_pinned: bool) -> Settings:
    """The same for servers that share one GPU, in bfloat16 and with weights that vLLM makes up.

    Args:
        num_sides: servers at once; each gets its part of nine tenths of the memory.
        is_pinned: answers are pinned, which only model runner V1 can.
    """
    share = f"{0.9 / num_sides:.2f}"
    arguments = ("--load-format", "dummy", "--gpu-memory-utilization", share)
    runner = {"VLLM_USE_V2_MODEL_RUNNER": "0"} if is_pinned else {}
    return dataclasses.replace(
        common,
        arguments=(*common.arguments, *arguments),
        environment={**common.environment, **runner},
        dtype="bfloat16",
    )


def add_options(parser: argparse.ArgumentParser, *, model: str, out: str) -> None:
    """The options that the benchmarks have in common."""
    parser.add_argument("--model", choices=MODELS, default=model, help="(%(default)s)")
    parser.add_argument("--traces", type=Path, default=ROOT.parent / "shared" / "traces")
    parser.add_argument("--sources", type=names, default=SOURCES, help="recorded texts")
    parser.add_argument("--cores", help="for each worker, as VLLM_CPU_OMP_THREADS_BIND: 0-1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / out)
    parser.add_argument("--logs", type=Path, default=ROOT / "out" / "serving")
    parser.add_argument("--quick", action="store_true", help="only to see that it works")


def parse_quick(
    parser: argparse.ArgumentParser, arguments: Sequence[str], quick: dict[str, Any]
) -> argparse.Namespace:
    """The command line, with other defaults where it says `--quick`."""
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**quick)
    return parser.parse_args(arguments)


def names(text: str) -> Sequence[str]:
    """A comma-separated option."""
    return tuple(text.split(","))


def written(args: argparse.Namespace) -> dict[str, str]:
    """The options of a run, for its results."""
    return {
        key: str(value) for key, value in vars(args).items() if key not in ("out", "logs", "traces")
    }
