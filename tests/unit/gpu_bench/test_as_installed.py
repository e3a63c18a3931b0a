# SPDX-License-Identifier: Apache-2.0
"""A checkout that is only on the path is found as the installed package is."""

from __future__ import annotations

from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from benchmarks.gpu.as_installed import write_metadata


def named(found: Distribution) -> set[tuple[str, str, str]]:
    return {(each.group, each.name, each.value) for each in found.entry_points}


def test_the_entry_points_are_those_of_the_package(tmp_path: Path) -> None:
    write_metadata(tmp_path)
    (found,) = distributions(path=[str(tmp_path)])
    installed = distribution("vllm-stateful")
    assert named(found) == named(installed)
    assert found.name == installed.name
    assert found.version == installed.version
