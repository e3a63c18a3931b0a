# SPDX-License-Identifier: Apache-2.0
"""The list of patches, its page and its diffs say the same. Needs no vLLM."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_stateful.compat import ledger, probe
from vllm_stateful.compat.ledger import PATCHES
from vllm_stateful.compat.patch import CompatError, Patch

PAGES = Path(__file__).parents[2] / "patches"


def file_of(patch: Patch) -> str:
    return patch.wrap.__module__.rpartition(".")[2]


def test_readme_is_what_the_ledger_renders() -> None:
    command = "python -m vllm_stateful.compat --markdown > patches/README.md"
    assert (PAGES / "README.md").read_text() == ledger.render_markdown(), f"run: {command}"


def test_every_patch_has_a_diff_and_every_diff_a_patch() -> None:
    on_disk = {str(path.relative_to(PAGES)) for path in PAGES.glob("vllm-0.32/*")}
    assert on_disk == {patch.upstream for patch in PATCHES}


def test_diffs_are_numbered() -> None:
    diffs = sorted({patch.upstream for patch in PATCHES})  # some share one
    assert [diff[: len("vllm-0.32/0000-")] for diff in diffs] == [
        f"vllm-0.32/{number:04}-" for number in range(1, len(diffs) + 1)
    ]


def test_a_diff_is_named_after_its_patch_and_only_patches_of_one_feature_share_one() -> None:
    for diff in {patch.upstream for patch in PATCHES}:
        sharing = [patch for patch in PATCHES if patch.upstream == diff]
        if len(sharing) == 1:
            assert diff.endswith(f"-{sharing[0].name}.patch")
        assert len({patch.feature for patch in sharing}) == 1


def test_every_patch_file_is_in_the_ledger() -> None:
    folder = Path(ledger.__file__).parent / "patches"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == {file_of(patch) for patch in PATCHES}


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_what_a_patch_calls_is_there(patch: Patch) -> None:
    for hook in patch.calls:
        module, _, name = hook.target.partition(":")
        path = Path(ledger.__file__).parents[2] / f"{module.replace('.', '/')}.py"
        functions = ast.FunctionDef | ast.AsyncFunctionDef
        tree = ast.parse(path.read_text())
        assert name in {node.name for node in tree.body if isinstance(node, functions)}


def test_names_and_targets_are_unique() -> None:
    assert len({patch.name for patch in PATCHES}) == len(PATCHES)
    assert len({patch.target for patch in PATCHES}) == len(PATCHES)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_every_field_is_filled(patch: Patch) -> None:
    values = dataclasses.asdict(patch) | {"adds": True}
    assert all(values.values()), values
    assert patch.process in {"api", "engine", "worker", "all"}
    assert patch.target.startswith("vllm.")


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_diff_names_the_file_it_retires(patch: Patch) -> None:
    text = (PAGES / patch.upstream).read_text()
    assert text.startswith("Subject: [")
    assert f"Retires: {patch.name} in vllm_stateful/compat/patches/{file_of(patch)}.py\n" in text


def test_patches_stay_few_and_small() -> None:
    assert len(PATCHES) <= 26
    assert len({patch.upstream for patch in PATCHES}) <= 18
    folder = Path(ledger.__file__).parent / "patches"
    wrappers = [
        node
        for path in folder.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert len(wrappers) == len(PATCHES)
    assert max((node.end_lineno or 0) - node.lineno for node in wrappers) <= 30


def test_text_shows_each_patch_with_its_status() -> None:
    text = ledger.render_text({patch.name: f"state of {patch.name}" for patch in PATCHES})
    assert all(f"status    state of {patch.name}\n" in text for patch in PATCHES)


def test_status_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise CompatError("no")

    monkeypatch.setattr(probe, "vllm_version", missing)
    assert ledger.status(PATCHES[0]) == "vLLM not installed"


def test_status_of_a_patch_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "vllm_version", lambda: "0.32.0")
    wrong = dataclasses.replace(PATCHES[0], target="string:Template.gone")
    assert ledger.status(wrong).startswith("drifted: patch 'cli-flags' does not fit string:")


def test_the_ledger_and_its_page_load_no_vllm() -> None:
    code = (
        "import sys; sys.argv = ['compat', '--markdown']\n"
        "from vllm_stateful.compat.__main__ import main\n"
        "assert main() == 0\n"
        "assert not {'vllm', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ledger.render_markdown()
