# SPDX-License-Identifier: Apache-2.0
"""``compat check``: a vLLM that is not installed, compared from its source."""

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from vllm_stateful.compat import ledger, probe, release
from vllm_stateful.compat.patch import CompatError

SITE = Path(str(importlib.util.find_spec("vllm").origin)).parents[1]  # type: ignore[union-attr]
VERSION = probe.vllm_version()
SERIES = str(probe.series_of(VERSION))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python files of the installed vLLM, to be changed."""
    folder = tmp_path_factory.mktemp("release")
    shutil.copytree(
        SITE / "vllm",
        folder / "vllm",
        ignore=shutil.ignore_patterns("*.so", "third_party", "models"),
    )
    return folder


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_stateful.compat", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_installed_one_fits() -> None:
    done = check(str(SITE))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        r"vLLM \S+ is supported\.\nCompared .* 0 drifted, 0 gone\.$", done.stdout.strip()
    )


SEEDS = {
    "parameter added": (
        "v1/core/kv_cache_manager.py",
        "def free(self, request: Request)",
        "def free(self, request: Request, hard: bool)",
        "drifted  sessions           vllm.v1.core.kv_cache_manager:KVCacheManager.free",
    ),
    "method gone": (
        "v1/core/block_pool.py",
        "def get_num_free_blocks(self)",
        "def num_free_blocks(self)",
        "gone     sessions           vllm.v1.core.block_pool:BlockPool.get_num_free_blocks",
    ),
    "attribute gone": (
        "v1/core/kv_cache_manager.py",
        "self.empty_kv_cache_blocks",
        "self.no_blocks",
        "gone     sessions           vllm.v1.core.kv_cache_manager:KVCacheManager."
        "empty_kv_cache_blocks",
    ),
    "other result": (
        "v1/core/kv_cache_manager.py",
        "-> tuple[KVCacheBlocks, int, int]:",
        "-> tuple[KVCacheBlocks, int, int, bool]:",
        "drifted  sessions           vllm.v1.core.kv_cache_manager:KVCacheManager."
        "get_computed_blocks",
    ),
    "no longer called": (
        "v1/core/sched/scheduler.py",
        "self._free_request_blocks(",
        "self._give_back(",
        "drifted  sessions           vllm.v1.core.sched.scheduler:Scheduler._free_request_blocks",
    ),
    "patched function changed": (
        "renderers/hf.py",
        "parse_chat_messages_async,",
        "parse_chat_messages_async as parse_async,",
        "gone     messages           vllm.renderers.hf:parse_chat_messages_async (patched)",
    ),
}


@pytest.mark.parametrize("seed", SEEDS)
def test_what_changed_is_named(seed: str, copy: Path) -> None:
    file, before, after, line = SEEDS[seed]
    path = copy / "vllm" / file
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    try:
        lines = release.compared(copy, ledger.PATCHES, SERIES)
    finally:
        path.write_text(text)
    said = release.report(VERSION, SERIES, lines)
    assert line in said
    assert line.split()[1] in said.rpartition("Features that would be off: ")[2]


def test_a_wheel_and_another_version(tmp_path: Path, copy: Path) -> None:
    wheel = tmp_path / "vllm-0.31.4-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm-0.31.4.dist-info/METADATA", "Name: vllm\nVersion: 0.31.4\n")
        for path in copy.rglob("*.py"):
            archive.write(path, path.relative_to(copy))
    done = check(str(wheel))
    assert done.stdout.startswith("vLLM 0.31.4 is not supported: ")
    assert "Compared with what is used of vLLM 0.32" in done.stdout
    assert done.returncode == int(SERIES != "0.32")


@pytest.mark.parametrize(
    ("version", "series"),
    [("0.31.2", "0.32"), ("0.32.1", "0.32"), ("0.34.0", "0.33"), ("x", "0.33")],
)
def test_the_nearest_series(version: str, series: str) -> None:
    assert release.nearest(version) == series


def test_what_is_no_vllm(tmp_path: Path) -> None:
    with (
        pytest.raises(CompatError, match="does not hold the package"),
        release.opened(str(tmp_path)),
    ):
        pass
