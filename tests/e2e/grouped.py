# SPDX-License-Identifier: Apache-2.0
"""Sessions on a model with several KV cache groups, or with a draft head; weights are made up.

    python grouped.py FAMILY HEAD OUT

FAMILY: of ``benchmarks.models.shapes``. HEAD: draft tokens of an EAGLE head, 0 for none. Answers
and computed tokens go to OUT as JSON, by session, in the order of the turns.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.models import shapes

SHARED, OWN, ADDED, ANSWER = 400, 200, 60, 24
"""Tokens that all sessions begin with, of each behind them, added in a turn, and generated."""

TURNS = 4


def engine(family: str, num_drafts: int) -> Any:
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
        return LLM(
            model,
            load_format="dummy",
            dtype="float32",
            enforce_eager=True,
            max_model_len=2048,
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            **more,
        )


def main(family: str, num_drafts: int, out: Path) -> None:
    """Three sessions that begin alike; one of them gets its answers back changed."""
    from vllm import SamplingParams

    random = Random(0)

    def text(length: int) -> list[int]:
        return [random.randrange(3, shapes.VOCAB) for _ in range(length)]

    llm = engine(family, num_drafts)
    shared = text(SHARED)
    names = ("appended", "stripped", "third-one")
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
    out.write_text(json.dumps(played))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
