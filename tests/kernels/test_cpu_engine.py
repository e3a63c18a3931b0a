# SPDX-License-Identifier: Apache-2.0
"""vLLM's engine on our CPU kernel: the answers of vLLM's own, with drafts and chunked prompts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_stateful.attention import cpu_ops

ROOT = Path(__file__).parents[2]
TINY = ROOT / ".cache" / "models" / "tiny-llama"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(cpu_ops.why_unavailable()), reason=cpu_ops.why_unavailable()),
    pytest.mark.skipif(not TINY.exists(), reason="the tiny model is not built: run `make model`"),
]


def played(choice: str) -> dict[str, Any]:
    program = [sys.executable, str(Path(__file__).with_name("cpu_engine.py")), str(TINY), choice]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_the_engine_answers_as_with_vllms_kernel() -> None:
    ours, vllms = played("auto"), played("off")
    assert ours["answers"] == vllms["answers"]
    assert ours["steps"]["taken"] > 0
    assert ours["steps"]["prefill"] > 0
    assert not vllms["steps"]
