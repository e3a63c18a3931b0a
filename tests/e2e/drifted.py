# SPDX-License-Identifier: Apache-2.0
"""Two turns of one conversation in an engine core of its own process; prints what was answered."""

from __future__ import annotations

import json
import sys

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt


def main(model: str) -> None:
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        kv_cache_memory_bytes=1 << 26,
        disable_log_stats=False,
    )
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    history = [7 + number % 50 for number in range(100)]
    answers, cached = [], []
    for _ in range(2):
        (made,) = llm.generate([TokensPrompt(prompt_token_ids=history)], greedy, use_tqdm=False)
        answers.append(list(made.outputs[0].token_ids))
        cached.append(made.num_cached_tokens)
        history = [*history, *answers[-1], 9, 8]
    print(json.dumps({"answers": answers, "cached": cached}))


if __name__ == "__main__":
    main(sys.argv[1])
