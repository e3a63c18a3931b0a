# SPDX-License-Identifier: Apache-2.0
"""A model with recurrent states on model runner V2, with vLLM's kernels for CUDA, on the host.

    python states.py FOLDER stock|plugin|mtp

Nemotron-H in small, in float32. ``stock`` has neither the plugin nor drafts. ``plugin`` drafts from
sessions, so that many drafts are right; answers end with a stop token, with a step in flight.
``mtp`` is Qwen3-Next in small, in bfloat16, whose own head drafts; it has random weights, so few of
its drafts are right.
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from random import Random
from typing import Any

import on_host

SIDE = sys.argv[2] if __name__ == "__main__" else "stock"
if SIDE != "stock":
    os.environ |= {
        "VLLM_STATEFUL": "1",
        "VLLM_STATEFUL_STRICT": "1",
        "VLLM_STATEFUL_CHECK_INVARIANTS": "1",
    }

if SIDE != "mtp":
    on_host.take_cuda_state_kernels()

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from benchmarks.models import shapes
from vllm_stateful.adapters.engine import device_drafts
from vllm_stateful.adapters.worker import lookup_speculator

NUM_DRAFTS, TURNS, SYSTEM, ADDED, MOST = 3, 3, 40, 9, 41
VOCAB = 2048 if SIDE == "mtp" else 256
STOPS = list(range(5, VOCAB, 12) if SIDE == "mtp" else range(3, VOCAB, 25))
SMALL = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 3,
    "hybrid_override_pattern": "M*M",
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "n_groups": 1,
    "ssm_state_size": 16,
    "chunk_size": 16,
}


def engine(folder: Path) -> LLM:
    """The engine with made-up weights, which are the same in every process."""
    on_host.allow_async_scheduling()
    on_host.skip_overflow_checks()
    shapes.liven()
    for module in (device_drafts, lookup_speculator):  # fewer programs to interpret
        module.BUFFER_TOKENS, module.REGION_TOKENS = 2048, 512
    family = shapes.FAMILIES["qwen3next" if SIDE == "mtp" else "nemotronh"]
    small = {} if SIDE == "mtp" else SMALL
    small = small | {"eos_token_id": STOPS}
    (folder / "config.json").write_text(json.dumps(family.config | small))
    options: dict[str, Any] = {}
    if SIDE == "mtp":
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": NUM_DRAFTS}
    elif SIDE == "plugin":
        options["speculative_config"] = {
            "method": "ngram_gpu",
            "num_speculative_tokens": NUM_DRAFTS,
        }
    made = LLM(
        str(folder),
        load_format="dummy",
        dtype=family.dtype,
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=4,
        num_gpu_blocks_override=64,
        enable_prefix_caching=SIDE != "stock",  # it wants what the kernel for a CPU does not do
        async_scheduling=True,
        skip_tokenizer_init=True,
        **options,
    )
    assert isinstance(made.llm_engine.engine_core.engine_core.scheduler, AsyncScheduler)
    return made


def text(random: Random, num: int) -> list[int]:
    return [random.randrange(VOCAB) for _ in range(num)]


def turns(llm: LLM, session: str) -> list[dict[str, Any]]:
    """One conversation; it is the same under each name."""
    random, said = Random(0), []
    history = text(random, SYSTEM)
    for number in range(TURNS):
        params = SamplingParams(
            temperature=0,
            max_tokens=MOST if number + 1 < TURNS else 4,
            ignore_eos=True,
            detokenize=False,
            stop_token_ids=STOPS,
            extra_args={"session_id": session},
        )
        prompt = TokensPrompt(prompt_token_ids=list(history))
        (answer,) = llm.generate([prompt], [params], use_tqdm=False)
        tokens = list(answer.outputs[0].token_ids)
        said.append(
            {
                "prompt": len(history),
                "cached": answer.num_cached_tokens or 0,
                "tokens": tokens,
                "reason": answer.outputs[0].finish_reason,
            }
        )
        history += tokens + text(random, ADDED)
    return said


def play(folder: Path) -> dict[str, Any]:
    """The conversation, and again from its answers under another name."""
    llm = engine(folder)
    found: dict[str, Any] = {"first": turns(llm, "session-first")}
    if SIDE != "plugin":
        return found
    scheduler: Any = llm.llm_engine.engine_core.engine_core.scheduler
    scheduler.stateful("close", {"session_ids": ["session-first"], "cache_salt": None})
    found["again"] = turns(llm, "session-again")
    return found | {"stats": scheduler.stateful("stats", {})}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "answers.json").write_text(json.dumps(play(place)))
