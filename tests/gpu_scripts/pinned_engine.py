# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402
"""Pinned answers in model runner V2 on the host, for test_serving_pins.py.

python pinned_engine.py FOLDER stock|ngram|drafts|adaptive
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

import engine

engine.SIDE = {"ngram": "drafts"}.get(sys.argv[2], sys.argv[2])

from benchmarks.serving.pinned_ids_v2 import FIELD

LENGTH, REQUESTS = 24, 3


def main(folder: Path) -> None:
    engine.count_steps()
    engine.write_config(folder, "small")
    engine.write_weights(folder)
    llm = engine.engine(folder, worker_extension_cls="benchmarks.serving.pinned_ids_v2.PinnedIds")
    random = Random(0)
    prompts = [engine.text(random, 60) for _ in range(REQUESTS)]
    # What stood in the prompt can be drafted; behind it stands what cannot.
    pinned = [prompt[10:28] + engine.text(random, LENGTH - 18) for prompt in prompts]
    free = engine.greedy(LENGTH)
    before = engine.ask(llm, prompts, free)
    began = len(engine.STEPS)
    params = [engine.greedy(LENGTH, extra_args={FIELD: ids}) for ids in pinned]
    said = engine.ask(llm, prompts, [*params[:-1], free])  # the last one is not pinned
    steps = engine.STEPS[began:]
    after = engine.ask(llm, prompts, free)
    answers = {"pinned": pinned, "said": said, "before": before, "after": after}
    (folder / "answers.json").write_text(json.dumps(answers | {"steps": steps}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
