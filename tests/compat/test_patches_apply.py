# SPDX-License-Identifier: Apache-2.0
"""The diffs meant for upstream apply to the installed vLLM, alone and together, and compile."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from vllm_stateful.compat import probe
from vllm_stateful.compat.ledger import PATCHES
from vllm_stateful.compat.patch import Patch

PAGES = Path(__file__).parents[2] / "patches"
# Finds the package without importing it.
SPEC = importlib.util.find_spec("vllm")

pytestmark = [
    pytest.mark.skipif(SPEC is None, reason="vLLM is not installed"),
    pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed"),
]


def changed_files(patch: Patch) -> list[str]:
    return re.findall(r"^--- a/(\S+)$", (PAGES / patch.upstream).read_text(), re.MULTILINE)


def copy_sources(patches: Iterable[Patch], folder: Path) -> list[Path]:
    assert SPEC is not None
    assert SPEC.submodule_search_locations is not None
    installed = Path(SPEC.submodule_search_locations[0]).parent
    copies = []
    for name in sorted({name for patch in patches for name in changed_files(patch)}):
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(installed / name, copy)
        copies.append(copy)
    return copies


def git_apply(patch: Patch, folder: Path, *options: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(
        ["git", "apply", "-p1", *options, str(PAGES / patch.upstream)],
        cwd=folder,
        env=environment | {"GIT_CEILING_DIRECTORIES": str(folder.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_diff_applies_alone_and_compiles(patch: Patch, tmp_path: Path) -> None:
    assert probe.is_supported(probe.vllm_version())
    copies = copy_sources([patch], tmp_path)
    stock = [copy.read_text() for copy in copies]
    git_apply(patch, tmp_path, "--check")
    git_apply(patch, tmp_path)
    for copy, text in zip(copies, stock, strict=True):
        changed = copy.read_text()
        assert changed != text
        compile(changed, str(copy), "exec")


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_diff_is_small(patch: Patch) -> None:
    lines = (PAGES / patch.upstream).read_text().partition("\n---\n")[2].splitlines()
    changed = [line for line in lines if re.match(r"[+-](?!\+\+ |-- )", line)]
    assert 0 < len(changed) < 40


def test_diffs_apply_together(tmp_path: Path) -> None:
    copy_sources(PATCHES, tmp_path)
    for patch in PATCHES:
        git_apply(patch, tmp_path)
