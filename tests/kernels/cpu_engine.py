# SPDX-License-Identifier: Apache-2.0
"""vLLM's engine with drafts, on our CPU kernel or its own: `cpu_engine.py MODEL auto|off`.

Prints the answers' token ids, and who served how many steps.
"""

import json
import os
import sys

os.environ.update(
    VLLM_STATEFUL="1",
    VLLM_STATEFUL_ATTENTION=sys.argv[2],
    VLLM_STATEFUL_CHECK_INVARIANTS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    HF_HUB_OFFLINE="1",
)

from vllm import LLM, SamplingParams, TokensPrompt

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 5,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 4,
}


def main() -> None:
    llm = LLM(
        sys.argv[1],
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        block_size=32,
        speculative_config=NGRAM,
        max_num_batched_tokens=256,
    )
    prompts = [
        [3 + (7 * i + 11 * j) % 50 for i in range(length)] for j, length in enumerate(LENGTHS)
    ]
    answers = llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
        use_tqdm=False,
    )
    from vllm_stateful.adapters.attention_choice import STEPS

    said = [list(answer.outputs[0].token_ids) for answer in answers]
    print(json.dumps({"answers": said, "steps": dict(STEPS)}))


LENGTHS = (5, 40, 300, 700)

if __name__ == "__main__":
    main()
