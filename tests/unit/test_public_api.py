# SPDX-License-Identifier: Apache-2.0
"""Public names: sorted, present, and no more than promised."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import vllm_stateful
from vllm_stateful import api, errors

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_package_exports_its_version_only() -> None:
    assert vllm_stateful.__all__ == ["__version__"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", vllm_stateful.__version__)


def test_exported_names_of_api_exist_and_are_sorted() -> None:
    assert sorted(api.__all__) == api.__all__
    assert all(hasattr(api, name) for name in api.__all__)


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


def test_vllm_is_an_extra_of_one_minor_version() -> None:
    assert PROJECT["dependencies"] == ["jinja2>=3.1", "numba>=0.60", "numpy>=1.26"]
    for wheel in PROJECT["optional-dependencies"].values():
        assert [item.partition(">=")[2] for item in wheel] == ["0.32,<0.33"]
