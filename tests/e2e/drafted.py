# SPDX-License-Identifier: Apache-2.0
"""Requests of every kind through one engine, with drafts from sessions or without.

    python tests/e2e/drafted.py --model DIR --out OUT [--drafts sessions|beside-head]

``beside-head`` has an EAGLE head of random weights, whose drafts are all wrong. Each kind is asked
three times: what an agent has said before is what it is drafted. Then greedy turns run beside
others: drawn ones, and with a logit bias, which are never drafted.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from heapq import nlargest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

NUM_TOKENS = 24
TOP_K = 3
PROMPT = [11, 500, 23, 77, 500, 23, 9, 4000, 23]
DRAFTS = {
    "method": "custom_class",
    "num_speculative_tokens": 16,
    "model": "vllm_stateful.adapters.speculation.SessionDrafter",
}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "logprobs": {"logprobs": 3},
    "all logprobs": {"logprobs": -1, "max_tokens": 6},
    "logprob_token_ids": {"logprob_token_ids": [500, 4000, 23]},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "repetition_detection": {"repetition_detection": {"max_pattern_size": 4, "min_count": 3}},
    "n": {"n": 2, "temperature": 1.0, "seed": 5},
    "presence_penalty": {"presence_penalty": 0.8},
    "frequency_penalty": {"frequency_penalty": 0.8},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "bad_words": {"bad_words": ["the", " a"]},
    "min_tokens": {"min_tokens": 12, "ignore_eos": False},
    "max_tokens": {"max_tokens": 3},
    "allowed_token_ids": {"allowed_token_ids": [*range(100, 140)]},
    "stop_token_ids": {"stop_token_ids": [*range(0, 49_000, 7)], "min_tokens": 2},
    "choice": {"structured_outputs": {"choice": ["yes, I think so", "no, I do not think so"]}},
    "json": {
        "structured_outputs": {
            "json": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome"]}, "sure": {"type": "boolean"}},
                "required": ["city", "sure"],
                "additionalProperties": False,
            }
        },
        "max_tokens": 60,
    },
    "min_p": {"temperature": 1.0, "seed": 7, "min_p": 0.2},
    "logit_bias": {"logit_bias": {500: 4.0, 23: -100.0, 4000: 3.0}},
    "asked for": {"extra_args": {"stateful_drafts": 1}},
    "without": {"extra_args": {"stateful_drafts": 0}},
}


NOT_BESIDE_HEADS = ("min_p", "logit_bias", "logprob_token_ids", "n")
"""vLLM refuses the first two, ends its engine at the third, and cannot draw the last on a CPU."""


def speculative(drafts: str, model: Path, folder: Path) -> dict[str, Any] | None:
    """What vLLM is told of drafts; a head is written to the folder."""
    if drafts != "beside-head":
        return DRAFTS if drafts else None
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    return {
        "method": "eagle",
        "model": str(folder),
        "num_speculative_tokens": 4,
        "draft_load_config": {"load_format": "dummy"},
    }


def answers(llm: Any, kinds: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Greedy answers by the name of the kind and its number."""
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    for name, options in kinds.items():
        said = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, **options}
        if "repetition_detection" in said:
            said["repetition_detection"] = RepetitionDetectionParams(**said["repetition_detection"])
        if "structured_outputs" in said:
            said["structured_outputs"] = StructuredOutputsParams(**said["structured_outputs"])
            said["ignore_eos"] = False
        for number in range(3):
            (output,) = llm.generate(
                {"prompt_token_ids": PROMPT}, SamplingParams(**said), use_tqdm=False
            )
            answer = output.outputs[-1]
            logprobs = [
                sorted(nlargest(4, ((found.logprob, token) for token, found in place.items())))
                for place in answer.logprobs or ()
            ]
            yield (
                f"{name} {number}",
                {
                    "token_ids": list(answer.token_ids),
                    "text": answer.text,
                    "finish_reason": answer.finish_reason,
                    "logprobs": logprobs,
                },
            )


def together(llm: Any, options: list[dict[str, Any]]) -> list[list[int]]:
    """The answers of turns that run at the same time."""
    from vllm import SamplingParams

    params = [SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **each) for each in options]
    prompts = [{"prompt_token_ids": PROMPT}] * len(params)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


DRAWN: dict[str, dict[str, Any]] = {
    "temperature": {},
    "top_k": {"top_k": TOP_K},
    "top_p": {"top_p": 0.9},
    "both": {"top_k": TOP_K, "top_p": 0.9},
    "min_p": {"min_p": 0.05},
    "top_k, min_p": {"top_k": TOP_K, "min_p": 0.05},
    "top_k, penalty": {"top_k": TOP_K, "frequency_penalty": 0.5},
}


def drawn(llm: Any) -> dict[str, list[int]]:
    """Answers that are drawn with a seed, one at a time, by what they are drawn from."""
    return {
        name: together(llm, [{"temperature": 1.0, "seed": 7, **options}])[0]
        for name, options in DRAWN.items()
    }


def mixed(llm: Any) -> list[list[int]]:
    """Greedy answers beside others that are drawn."""
    options = [
        {"temperature": each % 2, "top_k": TOP_K, "top_p": 0.9, "seed": each} for each in range(8)
    ]
    return together(llm, options)[::2]


def biased(llm: Any) -> list[list[int]]:
    """Greedy answers, each other one with a bias of its own."""
    options: list[dict[str, Any]] = [
        {"temperature": 0, **({"logit_bias": {100 * each: 20.0}} if each % 2 else {})}
        for each in range(8)
    ]
    return together(llm, options)


def scored(llm: Any) -> list[list[int]]:
    """Greedy answers; every other one has asked for the probabilities of tokens of its own."""
    asked = {"logprob_token_ids": [500, 23]}
    return together(llm, [{"temperature": 0, **(asked if each % 2 else {})} for each in range(8)])


def main() -> None:
    """Ask, and write what came."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--drafts", choices=["sessions", "beside-head"], default="")
    args = parser.parse_args()
    if args.drafts:
        os.environ["VLLM_STATEFUL"] = "1"
        os.environ["VLLM_STATEFUL_CHECK_INVARIANTS"] = "1"
    from vllm import LLM

    with TemporaryDirectory() as folder:
        llm = LLM(
            str(args.model),
            dtype="float32",
            max_model_len=1024,
            max_num_seqs=50,
            max_logprobs=-1,
            block_size=32,
            enforce_eager=True,
            speculative_config=speculative(args.drafts, args.model, Path(folder)),
        )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    is_beside_head = args.drafts == "beside-head"
    refused = NOT_BESIDE_HEADS if is_beside_head else ()
    said = dict(answers(llm, {name: kind for name, kind in KINDS.items() if name not in refused}))
    stop = said["greedy 0"]["text"][10:14]
    said |= dict(answers(llm, {"stop": {"stop": [stop]}}))
    document: dict[str, Any] = {"answers": said}

    def num_accepted() -> int:
        return scheduler.engine_drafts.drafts.num_accepted if args.drafts else 0

    document["accepted"] = num_accepted()
    if not is_beside_head:  # vLLM on a CPU cannot verify drafts beside drawn tokens
        document["biased"] = biased(llm)
        document["accepted_beside_bias"] = num_accepted() - document["accepted"]
        document["scored"] = scored(llm)
        document["mixed"] = mixed(llm)
        document["drawn"] = drawn(llm)
    args.out.write_text(json.dumps(document))


if __name__ == "__main__":
    main()
