# SPDX-License-Identifier: Apache-2.0
"""Answers chat conversations with one in-process vLLM engine, one after the other.

    python tests/e2e/ask.py --model DIR --conversations IN --out OUT [--history generated]

Without ``--history`` it is stock vLLM. With it the plugin is on, and a message whose content is
null stands for the answer to the conversation before, as a client would send it back.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

MAX_TOKENS = 12


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--conversations", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--history", choices=["retokenize", "generated"])
    args = parser.parse_args()
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1")
    if args.history:
        os.environ.update(VLLM_STATEFUL="1", VLLM_STATEFUL_HISTORY=args.history)
    from vllm import LLM, SamplingParams

    llm = LLM(args.model, dtype="float32", enforce_eager=True, max_model_len=2048)
    params = SamplingParams(temperature=0, max_tokens=64 if args.history else MAX_TOKENS)
    answers: list[dict[str, Any]] = []
    for messages in json.loads(args.conversations.read_text()):
        for message in messages:
            if message["content"] is None:
                message["content"] = answers[-1]["text"]
        (output,) = llm.chat(messages, params, use_tqdm=False)
        answer = output.outputs[0]
        answers.append(
            {
                "text": answer.text,
                "prompt": list(output.prompt_token_ids or []),
                "answer": list(answer.token_ids),
                "num_cached": output.num_cached_tokens,
            }
        )
    args.out.write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
