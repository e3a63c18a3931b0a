# SPDX-License-Identifier: Apache-2.0
"""Three sessions of four turns on a model with sliding windows whose KV is kept whole.

    python windowed.py OUT

Answers and computed tokens go to OUT as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

SHAPE = {  # Gemma 3 in small
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 32,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "torch_dtype": "float32",
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SESSIONS, TURNS, FIRST, ADDED, ANSWER = 3, 4, 500, 60, 24


def main(out: Path) -> None:
    from vllm import LLM, SamplingParams

    random = Random(0)

    def text(length: int) -> list[int]:
        return [random.randrange(3, SHAPE["vocab_size"]) for _ in range(length)]

    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SHAPE))
        llm = LLM(
            folder,
            load_format="dummy",
            dtype="float32",
            enforce_eager=True,
            max_model_len=2048,
            skip_tokenizer_init=True,
            disable_hybrid_kv_cache_manager=True,
        )
    histories = [text(FIRST) for _ in range(SESSIONS)]
    played = []
    for turn in range(TURNS):
        for session, history in enumerate(histories):
            history += text(ADDED)
            if (turn, session) == (2, 1):
                history[300] = 5  # an edit far outside of every window
            params = SamplingParams(
                temperature=0,
                max_tokens=ANSWER,
                ignore_eos=True,
                detokenize=False,
                extra_args={"session_id": f"session-number-{session}"},
            )
            prompt = {"prompt_token_ids": list(history)}
            (answer,) = llm.generate([prompt], [params], use_tqdm=False)
            said = list(answer.outputs[0].token_ids)
            played.append([len(history) - (answer.num_cached_tokens or 0), said])
            history += said
    out.write_text(json.dumps(played))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
