# SPDX-License-Identifier: Apache-2.0
"""Public names: sorted, present, and no more than promised."""

import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import vllm_stateful
from vllm_stateful import errors, request
from vllm_stateful.compat import probe

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_package_exports_its_version_only() -> None:
    assert vllm_stateful.__all__ == ["__version__"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", vllm_stateful.__version__)


def test_exported_names_of_request_exist_and_are_sorted() -> None:
    assert sorted(request.__all__) == request.__all__
    assert all(hasattr(request, name) for name in request.__all__)


def test_every_error_is_a_stateful_error() -> None:
    found = [e for e in vars(errors).values() if isinstance(e, type)]
    assert len(found) == 4
    assert all(issubclass(error, errors.StatefulError) for error in found)


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(vllm_stateful.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("group", sorted(PROJECT["entry-points"]))
def test_every_entry_point_has_the_plugins_name_and_exists(group: str) -> None:
    (name,) = PROJECT["entry-points"][group]
    assert name == "stateful"
    module, _, attribute = PROJECT["entry-points"][group][name].partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    assert f"\ndef {attribute}(" in Path(spec.origin).read_text()


def test_the_vllm_that_it_needs_is_the_one_that_it_supports() -> None:
    first, last = probe.SUPPORTED[0], probe.SUPPORTED[-1]
    wanted = f"vllm>={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}"
    assert PROJECT["dependencies"] == ["jinja2>=3.1", "numba>=0.60", "numpy>=1.26", wanted]


def wheel_of(folder: Path, name: str, version: str, *needs: str) -> None:
    """A wheel of metadata only."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {need}\n" for need in needs)
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize(
    ("version", "fits"),
    [("0.31.0", False), ("0.32.0", True), ("0.32.1", True), ("0.33.0", True), ("0.34.0", False)],
)
@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_it_installs_beside_a_vllm_that_fits(
    installer: str, version: str, fits: bool, tmp_path: Path
) -> None:
    """With our metadata, and those of the vLLM: nothing is downloaded, nothing installed."""
    wheel_of(tmp_path, "vllm", version)
    for name in ("jinja2", "numba", "numpy"):
        wheel_of(tmp_path, name, "99.0")
    wheel_of(tmp_path, "vllm-stateful", "0.1.0", *PROJECT["dependencies"])
    options = ["--no-index", "--find-links", str(tmp_path), "--dry-run"]
    if installer == "pip":
        command = ["-m", "pip", "install", "--ignore-installed", *options]
    else:
        command = ["-m", "uv", "pip", "install", "--target", str(tmp_path / "none"), *options]
    done = subprocess.run(
        [sys.executable, *command, "vllm-stateful", f"vllm=={version}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if installer == "uv" and "No module named uv" in done.stderr:
        pytest.skip("uv is not installed")
    assert (done.returncode == 0) == fits, done.stdout + done.stderr
