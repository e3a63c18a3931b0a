# SPDX-License-Identifier: Apache-2.0
"""A vLLM that has changed where adapters use it: one line, stock service, a working answer.

Each seed edits the source of the installed vLLM, in a copy made of links.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from forked import EAGER
from live_server import LiveServer
from local_models import TINY

from vllm_stateful.compat import probe, uses

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        probe.series_of(probe.vllm_version()) != uses.FIRST, reason="seen on the first series"
    ),
]

_SCHEDULER = "v1/core/sched/scheduler.py"
_MANAGER = "v1/core/kv_cache_manager.py"
_POOL = "v1/core/block_pool.py"


class Seed(NamedTuple):
    """Edits of files of vLLM, and what the line says."""

    edits: Mapping[str, tuple[tuple[str, str], ...]]
    said: str


_WITH_COUNT = """\
    def get_cached_block(
        self, block_hash: BlockHash, kv_cache_group_ids: list[int]
    ) -> tuple[list[KVCacheBlock] | None, int]:
        return self._found(block_hash, kv_cache_group_ids), 1

"""
_NOT_CALLED = """\
    def _free_request_blocks(self, request: Request):
        self._give_back(request)

"""

SEEDS = {
    "parameter added": Seed(
        {
            _MANAGER: (("def free(self, request: Request)", "def free(self, request, hard)"),),
            _SCHEDULER: (("kv_cache_manager.free(request)", "kv_cache_manager.free(request, 1)"),),
        },
        "KVCacheManager.free is (self, request, hard)",
    ),
    "parameter renamed": Seed(
        {
            _MANAGER: (
                (
                    "def cache_blocks(self, request: Request",
                    "def cache_blocks(self, owner: Request",
                ),
                ("cache_blocks(request, num_computed", "cache_blocks(owner, num_computed"),
            )
        },
        "KVCacheManager.cache_blocks is (self, owner, num_computed_tokens)",
    ),
    "method gone": Seed(
        {_SCHEDULER: (("_request_blocks_can_be_freed", "_may_free_blocks"),)},
        "Scheduler._request_blocks_can_be_freed does not exist",
    ),
    "attribute gone": Seed(
        {_SCHEDULER: (("sched_step_seq", "step_number"),)},
        "Scheduler.sched_step_seq does not exist",
    ),
    "class moved": Seed(
        {
            "v1/kv_hints/__init__.py": (("KvHintAction", "KvAction"),),
            "v1/kv_hints/protocol.py": (("KvHintAction", "KvAction"),),
        },
        "KvHintAction",
    ),
    "one more result": Seed(
        {
            _POOL: (("    def get_cached_block(\n", _WITH_COUNT + "    def _found(\n"),),
            "v1/core/single_type_kv_cache_manager.py": ((".get_cached_block(", "._found("),),
        },
        "BlockPool.get_cached_block is",
    ),
    "no longer called": Seed(
        {
            _SCHEDULER: (
                ("self._free_request_blocks(", "self._give_back("),
                ("    def _free_request_blocks(self", _NOT_CALLED + "    def _give_back(self"),
            )
        },
        "Scheduler._free_request_blocks is asked for by nobody",
    ),
}

IN_PROCESSES = ("class moved",)
"""Played with an engine core of its own process; the others in one, in half the time."""

TOGETHER = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def changed(edits: Mapping[str, tuple[tuple[str, str], ...]], folder: Path) -> None:
    """A package ``vllm`` of links to the installed one, with some files edited."""
    installed = Path(str(find_spec("vllm").origin)).parent  # type: ignore[union-attr]
    made = folder / "vllm"
    made.mkdir()
    own = {Path(name) for name in edits}
    folders = {parent for path in own for parent in path.parents}
    for each in sorted(folders):
        (made / each).mkdir(exist_ok=True)
        for entry in (installed / each).iterdir():
            path = each / entry.name
            if path not in own and path not in folders and entry.name != "__pycache__":
                (made / path).symlink_to(entry)
    for name, changes in edits.items():
        text = (installed / name).read_text()
        for before, after in changes:
            assert before in text, (name, before)
            text = text.replace(before, after)
        (made / name).write_text(text)


def played(path: Path | None, **environment: str) -> tuple[dict[str, Any], str]:
    """What was answered, and what was said, of the vLLM in a folder."""
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    program = Path(__file__).with_name("drifted.py")
    done = subprocess.run(
        [sys.executable, str(program), str(TINY)],
        env=os.environ | EAGER | {"VLLM_LOGGING_LEVEL": "INFO"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"answers"')]
    return (json.loads(lines[0]) if lines else {}), said


@cache
def stock() -> dict[str, Any]:
    if not (TINY / "config.json").exists():
        pytest.skip("the tiny model is not built: run `make model`")
    return played(None, **TOGETHER)[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_it_is_one_line_and_stock_answers(seed: str, tmp_path: Path) -> None:
    """Each process says it once: engine core, worker, and the client where it uses the same."""
    expected = stock()
    changed(SEEDS[seed].edits, tmp_path)
    in_process = {} if seed in IN_PROCESSES else TOGETHER
    found, said = played(tmp_path, VLLM_STATEFUL="1", **in_process)
    assert found == expected, said[-3000:]
    lines = [line for line in said.splitlines() if SEEDS[seed].said in line]
    said_by = [line.partition(")")[0] for line in lines]
    assert lines, said[-3000:]
    assert len(set(said_by)) == len(said_by), lines
    assert all("stateful: " in line and "off" in line for line in lines)
    assert "Traceback" not in said


def test_strict_it_is_refused(tmp_path: Path) -> None:
    changed(SEEDS["attribute gone"].edits, tmp_path)
    found, said = played(tmp_path, VLLM_STATEFUL="1", VLLM_STATEFUL_STRICT="1", **TOGETHER)
    assert not found
    assert "UnsupportedError" in said
    assert SEEDS["attribute gone"].said in said


def test_unchanged_it_is_on() -> None:
    found, said = played(None, VLLM_STATEFUL="1", **TOGETHER)
    assert found["answers"] == stock()["answers"]
    assert found["cached"][1] > stock()["cached"][1]
    assert "stateful: on" in said


def test_a_server_whose_engine_is_off_sends_requests_as_they_came(tmp_path: Path) -> None:
    """No salt by API key: it would divide the prefix cache of stock vLLM. The routes say why."""
    stock()
    changed(SEEDS["attribute gone"].edits, tmp_path)
    options = ["--plugin", "stateful", "--max-model-len", "1024", "--served-model-name", "tiny"]
    environment = {"PYTHONPATH": str(tmp_path)}
    asked = {"model": "tiny", "prompt": "one two three " * 100, "max_tokens": 4}
    with LiveServer(TINY, tmp_path / "server.log", *options, environment=environment) as live:
        cached = []
        for key in ("key-of-one", "key-of-another"):
            headers = {"Authorization": f"Bearer {key}", "X-Session-ID": f"session-of-{key}"}
            answer = httpx.post(
                f"{live.url}/v1/completions", json=asked, headers=headers, timeout=60
            ).json()
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        gone = httpx.delete(f"{live.url}/v1/sessions/session-of-key-of-one")
        time.sleep(3)  # the metrics are asked for once a second
        metrics = httpx.get(f"{live.url}/metrics").text
        said = live.log.read_text()
    assert cached[1] > cached[0]
    assert gone.status_code == 501
    assert SEEDS["attribute gone"].said in gone.text
    assert "vllm_stateful_engines_off{" in metrics
    assert said.count("the engine keeps no sessions, so requests reach it as they came: ") == 1
    assert "Traceback" not in said
