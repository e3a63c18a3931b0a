# SPDX-License-Identifier: Apache-2.0
"""Compile the two libraries of NVIDIA's driver that a machine without one has to pretend."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
DRIVER_CALL = re.compile(r"\bU (cu[A-Z]\w+)$", re.MULTILINE)
RUNTIME_OF_FILES = "cuFile"  # a library of its own
ALWAYS = ("cuInit", "cuGetErrorString", "cuGetProcAddress_v2", "cuDriverGetVersion")


def symbols(library: Path, option: str) -> str:
    """What `nm` prints about a library.

    Raises:
        subprocess.CalledProcessError: it is none.
    """
    command = ["nm", "-D", option, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def driver_calls(libraries: Iterable[Path]) -> set[str]:
    """The calls of the CUDA driver that these libraries need when they are loaded."""
    found = {name for each in libraries for name in DRIVER_CALL.findall(symbols(each, "-u"))}
    return {name for name in found if not name.startswith(RUNTIME_OF_FILES)}


def build(folder: Path, libraries: Iterable[Path]) -> None:
    """Both stubs into a folder; libcuda has every call that the libraries need.

    Raises:
        subprocess.CalledProcessError: gcc says why not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = folder / "names.h"
    calls = sorted(driver_calls(libraries) | set(ALWAYS))
    names.write_text("".join(f"STUB({name})\n" for name in calls))
    for name, source in ("libcuda.so.1", "cuda.c"), ("libnvidia-ml.so.1", "nvml.c"):
        command = ["gcc", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{name}", f'-DNAMES="{names}"']
        subprocess.run([*command, str(HERE / source), "-o", str(folder / name)], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]), map(Path, sys.argv[2:]))
