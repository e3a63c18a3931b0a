# SPDX-License-Identifier: Apache-2.0
"""Finds the compiled kernels, if they were built."""

from pathlib import Path

import vllm_stateful

CUDA = "_C.abi3.so"
CPU = "_C_cpu.abi3.so"


def library(name: str) -> Path:
    """The path of a library. If it was not built, this is the path that it would have.

    In an editable installation it is among the installed packages, not in the source folder.
    """
    paths = [Path(folder) / name for folder in vllm_stateful.__path__]
    return next((path for path in paths if path.exists()), paths[0])
