# SPDX-License-Identifier: Apache-2.0
"""The diffs meant for upstream apply to the installed vLLM, alone and together, and compile."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from vllm_stateful.compat import probe
from vllm_stateful.compat.ledger import PATCHES

PAGES = Path(__file__).parents[2] / "patches"
# Finds the package without importing it.
SPEC = importlib.util.find_spec("vllm")
# Each series of vLLM has a folder with the same diffs, named after its major and minor version.
SERIES = "none" if SPEC is None else ".".join(probe.vllm_version().split(".")[:2])
DIFFS = PAGES / f"vllm-{SERIES}"
# Some patches share a diff: what is one seam upstream is several places to wrap.
SHARED = Counter(Path(patch.upstream).name for patch in PATCHES)

pytestmark = [
    pytest.mark.skipif(SPEC is None, reason="vLLM is not installed"),
    pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed"),
]


def changed_files(diff: str) -> list[str]:
    """Files of vLLM that a diff changes; those that it adds are not among them."""
    return re.findall(r"^--- a/(\S+)$", (DIFFS / diff).read_text(), re.MULTILINE)


def added_files(diff: str) -> list[str]:
    return re.findall(r"^--- /dev/null\n\+\+\+ b/(\S+)$", (DIFFS / diff).read_text(), re.MULTILINE)


def copy_sources(diffs: Iterable[str], folder: Path) -> list[Path]:
    assert SPEC is not None
    assert SPEC.submodule_search_locations is not None
    installed = Path(SPEC.submodule_search_locations[0]).parent
    copies = []
    for name in sorted({name for diff in diffs for name in changed_files(diff)}):
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(installed / name, copy)
        copies.append(copy)
    return copies


def git_apply(diff: str, folder: Path, *options: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(
        ["git", "apply", "-p1", *options, str(DIFFS / diff)],
        cwd=folder,
        env=environment | {"GIT_CEILING_DIRECTORIES": str(folder.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_folders_are_those_of_the_supported_series_and_hold_the_same_diffs() -> None:
    series = {f"vllm-{major}.{minor}" for major, minor in probe.SUPPORTED}
    assert {path.parent.name for path in PAGES.glob("vllm-*/*")} == series
    for folder in series:
        assert {path.name for path in (PAGES / folder).iterdir()} == set(SHARED)


@pytest.mark.parametrize("diff", SHARED)
def test_diff_applies_alone_and_compiles(diff: str, tmp_path: Path) -> None:
    assert probe.is_supported(probe.vllm_version())
    assert f"\nBase: vLLM {SERIES}." in (DIFFS / diff).read_text()
    copies = copy_sources([diff], tmp_path)
    stock = [copy.read_text() for copy in copies]
    git_apply(diff, tmp_path, "--check")
    git_apply(diff, tmp_path)
    for copy, text in zip(copies, stock, strict=True):
        changed = copy.read_text()
        assert changed != text
        compile(changed, str(copy), "exec")
    for name in added_files(diff):
        compile((tmp_path / name).read_text(), name, "exec")


@pytest.mark.parametrize(("diff", "num_patches"), SHARED.items())
def test_diff_is_small(diff: str, num_patches: int) -> None:
    lines = (DIFFS / diff).read_text().partition("\n---\n")[2].splitlines()
    changed = [line for line in lines if re.match(r"[+-](?!\+\+ |-- )", line)]
    assert 0 < len(changed) < 30 + 10 * num_patches


def test_diffs_apply_together_and_compile(tmp_path: Path) -> None:
    copies = copy_sources(SHARED, tmp_path)
    for diff in SHARED:
        git_apply(diff, tmp_path)
    for copy in copies:
        compile(copy.read_text(), str(copy), "exec")
