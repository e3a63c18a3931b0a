# SPDX-License-Identifier: Apache-2.0
"""Where the compiled kernels are, if they were built."""

from pathlib import Path

import vllm_stateful

CUDA = "_C.abi3.so"
CPU = "_C_cpu.abi3.so"


def library(name: str) -> Path:
    """Its path; where it would be when it was not built.

    In an editable installation it lies beside the other installed packages, not in the sources.
    """
    paths = [Path(folder) / name for folder in vllm_stateful.__path__]
    return next((path for path in paths if path.exists()), paths[0])
