# SPDX-License-Identifier: Apache-2.0
"""Sessions on a model with several KV cache groups, or with a draft head; weights are made up.

    python grouped.py FAMILY HEAD OUT [BLOCKS]

FAMILY: of ``benchmarks.models.shapes``. HEAD: draft tokens of an EAGLE head, 0 for none. BLOCKS:
with it there are more sessions, and the plugin has a KV cache of so many blocks, too small for all
of them, beside vLLM's offload tier. Answers and computed tokens go to OUT as JSON, by session, in
the order of the turns. Beside the tier `restored` is how many turns were loaded from it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from play import offloading

from benchmarks.models import shapes

SHARED, OWN, ADDED, ANSWER = 400, 200, 60, 24
"""Tokens that all sessions begin with, of each behind them, added in a turn, and generated."""

TURNS = 4

BLOCK_SIZE = 32
"""Tokens of a block beside the tier."""


def engine(family: str, num_drafts: int, num_blocks: int) -> Any:
    """The engine, in this process."""
    from vllm import LLM

    shapes.liven()
    with TemporaryDirectory() as model, TemporaryDirectory() as head:
        shapes.write(family, Path(model))
        more: dict[str, Any] = {}
        if num_drafts:
            config = json.loads(Path(model, "config.json").read_text())
            Path(head, "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
            more["speculative_config"] = {
                "method": "eagle",
                "model": head,
                "num_speculative_tokens": num_drafts,
            }
        if num_blocks:
            more["num_gpu_blocks_override"] = num_blocks
            more["kv_transfer_config"] = offloading(256 * 1024**2)
            more["block_size"] = BLOCK_SIZE
        return LLM(
            model,
            load_format="dummy",
            dtype="float32",
            enforce_eager=True,
            max_model_len=1280,
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            **more,
        )


def main(family: str, num_drafts: int, out: Path, num_blocks: int = 0) -> None:
    """Sessions that begin alike; one of them gets its answers back changed."""
    from vllm import SamplingParams

    random = Random(0)
    num_others = 5 if num_blocks else 0

    def text(length: int) -> list[int]:
        return [random.randrange(3, shapes.VOCAB) for _ in range(length)]

    has_tier = num_blocks > 0 and os.environ.get("VLLM_STATEFUL") == "1"
    llm = engine(family, num_drafts, num_blocks if has_tier else 0)
    shared = text(SHARED)
    names = ["appended", "stripped", "third-one", *(f"other-{n}" for n in range(num_others))]
    histories = {name: shared + text(OWN) for name in names}
    played: dict[str, list[Any]] = {name: [] for name in names}
    for _ in range(TURNS):
        for name in names:
            history = histories[name]
            history += text(ADDED)
            params = SamplingParams(
                temperature=0,
                max_tokens=ANSWER,
                ignore_eos=True,
                detokenize=False,
                extra_args={"session_id": f"session-{name}"},
            )
            prompt = {"prompt_token_ids": list(history)}
            (answer,) = llm.generate([prompt], [params], use_tqdm=False)
            said = list(answer.outputs[0].token_ids)
            played[name].append([len(history) - (answer.num_cached_tokens or 0), said])
            history += said[ANSWER // 2 :] if name == "stripped" else said
    if has_tier:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        outcomes = scheduler.kv_cache_manager.turn_counts.outcomes
        played["restored"] = [outcomes["restored"]]
    out.write_text(json.dumps(played))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
