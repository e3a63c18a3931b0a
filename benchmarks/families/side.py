# SPDX-License-Identifier: Apache-2.0
"""One side: plays the workloads on one family, with the engine in this process.

Whether the plugin is on is up to the environment.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.families.workloads import ANSWER, WORKLOADS, Answer, play
from benchmarks.models import shapes

MAX_MODEL_LEN = 4096


def start(family: str, engine_args: dict[str, Any]) -> Any:
    """The engine with the family's made-up weights, which are the same in every process."""
    from vllm import LLM

    shapes.liven()
    with TemporaryDirectory() as folder:
        shapes.write(family, Path(folder))
        return LLM(
            folder,
            load_format="dummy",
            dtype=shapes.FAMILIES[family].dtype,
            enforce_eager=True,
            max_model_len=MAX_MODEL_LEN,
            skip_tokenizer_init=True,
            **engine_args,
        )


def described(llm: Any) -> dict[str, Any]:
    """KV cache groups, sizes in tokens, and whether there is a prefix cache at all."""
    config = llm.llm_engine.vllm_config
    groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    cache = config.cache_config
    return {
        "groups": [
            {
                "spec": type(group.kv_cache_spec).__name__,
                "block_size": group.kv_cache_spec.block_size,
                "layers": len(group.layer_names),
                "window": getattr(group.kv_cache_spec, "sliding_window", None)
                or getattr(group.kv_cache_spec, "attention_chunk_size", None),
            }
            for group in groups
        ],
        "hit_alignment": cache.cache_hit_alignment_tokens,
        "prefix_caching": cache.enable_prefix_caching,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
    }


def play_side(family: str, engine_args: dict[str, Any], turns: int, out: Path) -> None:
    """Play all workloads, `turns` turns of each session, and write what happened to `out`."""
    from vllm import SamplingParams

    llm = start(family, engine_args)

    def ask(session: str, prompt: list[int]) -> Answer:
        params = SamplingParams(
            temperature=0,
            max_tokens=ANSWER,
            ignore_eos=True,
            detokenize=False,
            logprobs=1,
            extra_args={"session_id": session},
        )
        (answer,) = llm.generate([{"prompt_token_ids": list(prompt)}], [params], use_tqdm=False)
        said = answer.outputs[0]
        first = said.logprobs[0][said.token_ids[0]].logprob
        return Answer(list(said.token_ids), first, answer.num_cached_tokens or 0)

    played = {workload.name: play(workload, turns, ask) for workload in WORKLOADS}
    out.write_text(json.dumps(described(llm) | {"played": played}))
