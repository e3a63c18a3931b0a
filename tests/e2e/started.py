# SPDX-License-Identifier: Apache-2.0
"""An engine that is started for real, from made-up weights, and what it says of itself.

    python started.py FOLDER OPTIONS OUT

FOLDER: with `config.json`. OPTIONS: further ones of `LLM`, as JSON. Groups of the KV cache and why
no sessions are kept go to OUT as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: str, options: str, out: Path) -> None:
    """Start it, and ask its scheduler."""
    from vllm import LLM

    from vllm_stateful.adapters.doctor.verdict import groups_of

    llm = LLM(
        folder,
        load_format="dummy",
        dtype="float32",
        enforce_eager=True,
        max_model_len=1280,
        skip_tokenizer_init=True,
        **json.loads(options),
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    said = {"groups": groups_of(scheduler), "reason": scheduler.stateful_off}
    out.write_text(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
