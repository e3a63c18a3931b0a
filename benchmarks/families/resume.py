# SPDX-License-Identifier: Apache-2.0
"""What a turn computes on each family of models: stock vLLM, stock at its best, the plugin.

    python -m benchmarks.families.resume [--families a,b] [--out DIR] [--strict]

Each side is a process of its own, one at a time: a fork of this one, which has imported vLLM. DIR
gets one JSON a family and one log a side; the tables are of every family that DIR has a JSON of, so
a long run can be made in parts. Tokens and answers are recorded, times are not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.families.report import tables
from benchmarks.families.side import play_side
from benchmarks.families.workloads import TURNS
from benchmarks.models.shapes import FAMILIES, SERVED

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # vLLM compiles one function of its sampler also where it is eager
}
TIMEOUT_S = 1800
UNITS = (32, 8)  # tokens; 8 divides every block of Mamba layers
CHUNKS = (512, 500)
"""Tokens a step, for what stock differs by from itself: as kernels have it, and not."""


@dataclass(frozen=True)
class Side:
    """One process: its engine arguments, its environment, how many turns of each session."""

    name: str
    engine_args: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    turns: int = TURNS


def settings(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What stock does better with than with its defaults, as engine arguments.

    A retention interval of None keeps the states of windows and Mamba layers at every block.
    `prefix_match_unit` lets a hit end within a block, where no group has windows; vLLM takes it
    where there are several groups. A block of a model with Mamba layers is at least as large as a
    state, so `block_size` is left alone there.
    """
    if len(groups) > 1 and any(each["spec"] == "MambaSpec" for each in groups):
        dense = {"prefix_cache_retention_interval": None}
        return [{"prefix_match_unit": unit} | dense for unit in UNITS]
    if len(groups) > 1:
        return [{"block_size": 32, "prefix_cache_retention_interval": None}]
    return [{"block_size": 32}]


def run_side(family: str, side: Side, out: Path) -> dict[str, Any]:
    """Play one side. `error` or `off` in the result is the line of its log that says why."""
    result, log = out / f"{family}.{side.name}.part", out / f"{family}.{side.name}.log"
    process = os.fork()
    if process == 0:
        _be_side(family, side, result, log)
    _, status = os.waitpid(process, 0)
    said: dict[str, Any] = {"engine_args": side.engine_args}
    if code := os.waitstatus_to_exitcode(status):
        return said | {"error": _last_line(log, "Error") or f"exit status {code}"}
    said |= json.loads(result.read_text())
    result.unlink()
    off = _last_line(log, "stateful: off")
    return said | ({"off": off.split("stateful: ", 1)[1]} if off else {})


def _be_side(family: str, side: Side, result: Path, log: Path) -> NoReturn:
    """Be the process of one side: vLLM is imported, and has no engine, plugin or thread yet."""
    signal.alarm(TIMEOUT_S)
    printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.environ.update(side.environment)
    code = 1
    try:
        play_side(family, side.engine_args, side.turns, result)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _last_line(log: Path, text: str) -> str:
    """The last line with `text` in it. vLLM warns of an Error where there is no tokenizer."""
    lines = (line.strip() for line in log.read_text().splitlines())
    found = [each for each in lines if text in each and "Tokenizer not available" not in each]
    return found[-1] if found else ""


def run_family(family: str, out: Path, *, strict: bool) -> dict[str, Any]:
    """Play all sides of one family: by name, what each computed and answered."""
    dtype = FAMILIES[family].dtype
    stock = run_side(family, Side("stock"), out)
    document: dict[str, Any] = {"family": family, "dtype": dtype, "sides": {"stock": stock}}
    if "error" in stock:
        return document
    sides = []
    if stock["prefix_caching"]:
        arguments = enumerate(settings(stock["groups"]), 1)
        sides += [Side(f"stock-{number}", each) for number, each in arguments]
    if dtype == "bfloat16":
        for chunk in CHUNKS:
            sides.append(Side(f"chunked-{chunk}", {"max_num_batched_tokens": chunk}, turns=1))
    plugin = {"VLLM_STATEFUL": "1", "VLLM_STATEFUL_CHECK_INVARIANTS": "1"}
    if strict:
        plugin["VLLM_STATEFUL_STRICT"] = "1"
    sides.append(Side("plugin", environment=plugin))
    for side in sides:
        document["sides"][side.name] = run_side(family, side, out)
    return document


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.families.resume", description=__doc__)
    parser.add_argument("--families", default=",".join(SERVED), help="names, with commas between")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "families")
    parser.add_argument("--strict", action="store_true", help="refuse to serve as stock vLLM")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in [name for name in os.environ if name.startswith("VLLM_STATEFUL")]:
        del os.environ[name]
    os.environ.update(ENVIRONMENT)
    importlib.import_module("vllm.entrypoints.llm")
    for family in options.families.split(","):
        document = run_family(family, options.out, strict=options.strict)
        (options.out / f"{family}.json").write_text(json.dumps(document) + "\n")
        sides = document["sides"].items()
        print(family, *(f"{n}: {s.get('error', 'ended')}" for n, s in sides), flush=True)
    found = [options.out / f"{family}.json" for family in FAMILIES]
    text = tables([json.loads(path.read_text()) for path in found if path.exists()])
    (options.out / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
