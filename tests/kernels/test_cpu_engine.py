# SPDX-License-Identifier: Apache-2.0
"""vLLM's engine on our CPU kernel: the answers of vLLM's own, with drafts and chunked prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
from forked import with_vllm

from vllm_stateful.attention import cpu_ops

ROOT = Path(__file__).parents[2]
TINY = ROOT / ".cache" / "models" / "tiny-llama"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(cpu_ops.why_unavailable()), reason=cpu_ops.why_unavailable()),
    pytest.mark.skipif(not TINY.exists(), reason="the tiny model is not built: run `make model`"),
]


def played(choice: str) -> dict[str, Any]:
    said = with_vllm().run(Path(__file__).with_name("cpu_engine.py"), TINY, choice)
    answer: dict[str, Any] = json.loads(said.splitlines()[-1])
    return answer


def test_the_engine_answers_as_with_vllms_kernel() -> None:
    ours, vllms = played("auto"), played("off")
    assert ours["answers"] == vllms["answers"]
    assert ours["steps"]["taken"] > 0
    assert ours["steps"]["prefill"] > 0
    assert not vllms["steps"]
