# SPDX-License-Identifier: Apache-2.0
"""An engine with the plugin and its files, from start to end, and what it answered.

    python restarted.py MODEL FILES IN OUT

IN and OUT are JSON: a list of questions, and a list of what became of them, in the same order.
Each question is asked when all that the one before wrote is in files.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

BLOCK = 32
MAX_TOKENS = 8


def connector(files: Path) -> dict[str, Any]:
    """vLLM's offload tier with our policy and our files, and a worker that runs on a CPU."""
    tier = {"type": "SessionFiles", "module_path": "vllm_stateful.adapters.session_files"}
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "cpu_bytes_to_use": 8 << 20,
            "offload_prompt_only": False,
            "spec_name": "HostTieringSpec",
            "spec_module_path": "benchmarks.reliability.host_tier",
            "eviction_policy": "StatefulCachePolicy",
            "cache_policy_module_path": "vllm_stateful.adapters.offload_policy",
            "secondary_tiers": [{**tier, "root_dir": str(files)}],
        },
    }


def main(model: str, files: Path, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ask all questions; for each the answer, the cached tokens, and the new files."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_STATEFUL="1",
        VLLM_STATEFUL_CHECK_INVARIANTS="1",
    )
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        block_size=BLOCK,
        kv_transfer_config=connector(files),
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    found = []
    for question in asked:
        for path in question.get("cut", ()):
            os.truncate(path, 100)
        before = set(files.rglob("*.bin"))
        prompt = {"prompt_token_ids": question["prompt"], "cache_salt": question["salt"]}
        (done,) = llm.generate([prompt], params, use_tqdm=False)
        while scheduler.has_requests():
            llm.llm_engine.step()
        new = set(files.rglob("*.bin")) - before
        answer = list(done.outputs[0].token_ids)
        found.append(
            {"answer": answer, "cached": done.num_cached_tokens, "new": sorted(map(str, new))}
        )
    llm.llm_engine.engine_core.shutdown()
    return found


if __name__ == "__main__":
    questions = json.loads(Path(sys.argv[3]).read_text())
    Path(sys.argv[4]).write_text(json.dumps(main(sys.argv[1], Path(sys.argv[2]), questions)))
