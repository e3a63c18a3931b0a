# SPDX-License-Identifier: Apache-2.0
"""What the doctor says before a start is what the engine says that is started."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import started
from forked import with_vllm

from benchmarks.models import shapes
from vllm_stateful.adapters import doctor

pytestmark = pytest.mark.e2e

PROGRAM = Path(doctor.__file__).with_name("__main__.py")
ALONE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_STATEFUL": "1",
    "HF_HUB_OFFLINE": "1",
}
CACHING = {"enable_prefix_caching": True}
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "full": ("llama", {}, False),
    "windows": ("gemma3", {}, False),
    "states": ("nemotronh", CACHING, False),
    "short convolutions": ("lfm2", CACHING, False),
    "short convolutions by default": ("lfm2", {}, False),
    "no prefix caching": ("llama", {"enable_prefix_caching": False}, False),
    "a draft head": ("llama", {}, True),
}


def words_of(options: dict[str, Any]) -> list[str]:
    """The same options for ``vllm serve``."""
    words = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1280"]
    words += ["--skip-tokenizer-init"]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", json.dumps(value)]
    return words


@pytest.mark.parametrize("case", CASES)
def test_the_doctor_and_the_engine_say_the_same(tmp_path: Path, case: str) -> None:
    family, options, has_head = CASES[case]
    model, head = tmp_path / "model", tmp_path / "head"
    model.mkdir()
    shapes.write(family, model)
    if has_head:
        head.mkdir()
        config = json.loads((model / "config.json").read_text())
        (head / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
        drafts = {"method": "eagle", "model": str(head), "num_speculative_tokens": 2}
        options = {"speculative_config": drafts}
    out, found = tmp_path / "engine.json", tmp_path / "findings"
    engine = Path(started.__file__)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(with_vllm().run, PROGRAM, found, model, *words_of(options), **ALONE)
        with_vllm().run(engine, model, json.dumps(options), out, **ALONE)
        asked.result()
    findings = [json.loads(line) for line in found.read_text().splitlines()]
    by_section = {each["section"]: each for each in findings}
    assert by_section["sessions"]["facts"] == json.loads(out.read_text())
    drafts = "from sessions" if case in ("full", "windows") else "none: --stateful-drafts auto: "
    drafts = "from the head (eagle)" if has_head else drafts
    assert by_section["drafts"]["text"].startswith(drafts)
