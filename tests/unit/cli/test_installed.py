# SPDX-License-Identifier: Apache-2.0
"""What is installed, and what of it does not fit, told without vLLM."""

import importlib.machinery
import importlib.util
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_stateful.cli import installed
from vllm_stateful.compat import probe, release
from vllm_stateful.compat.patch import CompatError


def found(*groups: str) -> object:
    """Stands in for ``metadata.entry_points``: these groups have the plugin."""
    return lambda group: SimpleNamespace(names={installed.PLUGIN} if group in groups else set())


BOTH = ("vllm.general_plugins", "vllm.endpoint_plugins")


@pytest.mark.parametrize(
    ("version", "mark"), [("0.32.0", "ok"), ("0.33.1", "ok"), ("0.34.0", "off")]
)
def test_a_version_of_vllm_is_supported_or_not(
    version: str, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "vllm_version", lambda: version)
    finding = installed.versions()
    assert finding.mark == mark
    assert f"vllm {version}" in finding.text
    assert ("(supported)" in finding.text) == (mark == "ok")
    assert finding.facts["vllm"] == version


def test_no_vllm_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise CompatError("vLLM is not installed")

    monkeypatch.setattr(probe, "vllm_version", none)
    finding = installed.versions()
    assert finding.mark == "off"
    assert "not installed" in finding.text


@pytest.mark.parametrize(
    ("groups", "environ", "mark"),
    [
        (BOTH, {}, "ok"),
        (BOTH, {"VLLM_PLUGINS": "stateful"}, "ok"),
        (BOTH, {"VLLM_PLUGINS": "other"}, "off"),
        (BOTH, {"VLLM_PLUGINS": ""}, "off"),
        (BOTH[:1], {}, "off"),
        ((), {}, "off"),
    ],
)
def test_vllm_finds_the_entry_points_or_not(
    groups: tuple[str, ...],
    environ: dict[str, str],
    mark: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metadata, "entry_points", found(*groups))
    assert installed.entry_points(environ).mark == mark


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[release.Line]:
    """What a comparison gives; a vLLM lies somewhere."""
    made = [release.Line("sessions", "vllm.a:B.c", "fits", process="engine")]
    spec = importlib.machinery.ModuleSpec("vllm", None, origin=str(Path("/x/vllm/__init__.py")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(release, "compared", lambda *_: made)
    return made


def test_all_fits(lines: list[release.Line]) -> None:
    (finding,) = installed.fit("0.32.0")
    assert (finding.mark, finding.facts) == ("ok", {"fits": 1, "drifted": 0})


def test_what_does_not_fit_is_off_in_its_process_with_all_that_needs_it(
    lines: list[release.Line],
) -> None:
    lines.append(release.Line("transport", "vllm.a:D.e", "gone", process="api"))
    first, api = installed.fit("0.32.0")
    assert (first.mark, api.mark) == ("off", "off")
    assert api.facts == {"process": "api", "features": ["endpoint", "responses", "transport"]}
    assert "API server" in api.text
    assert "vllm.a:D.e is gone" in api.text


def test_what_every_process_uses_is_off_in_every_process(lines: list[release.Line]) -> None:
    lines.append(release.Line("sessions", "vllm.a:D.e", "drifted", "() became (x)", "all"))
    assert [f.facts.get("process") for f in installed.fit("0.32.0")] == [
        None,
        "api",
        "engine",
        "worker",
    ]


def test_kernels_that_do_not_fit_take_nothing_else_with_them(lines: list[release.Line]) -> None:
    lines.append(release.Line("attention-cuda", "vllm.a:D.e", "gone", process="worker"))
    assert [finding.mark for finding in installed.fit("0.32.0")] == ["warn", "warn"]
