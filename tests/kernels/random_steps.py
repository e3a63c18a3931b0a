# SPDX-License-Identifier: Apache-2.0
"""Plays random steps with an emulator until one is wrong, in a process of its own: it may crash.

    python random_steps.py LIBRARY KERNEL CASES

Exits with 0 when all steps came out right, with 3 when one did not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from cases import WGMMA_BLOCK_KEYS, random_case
from emulator import ROOT, Emulator, HangError

WRONG = 3


def play(
    library: Path, kernel: str, cases: int, *, watched: bool = False
) -> subprocess.CompletedProcess[str]:
    """Play in a process of its own.

    Args:
        kernel: ``mma``, ``wgmma`` or ``fp8``, which is ``mma`` over a cache in fp8.
        watched: The library was built with `WATCHED`: every access outside of an allocation ends
            the process.
    """
    command = [sys.executable, __file__, library, kernel, cases]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if watched:
        environment |= {
            "LD_PRELOAD": " ".join(map(str, sanitizer())),
            "ASAN_OPTIONS": "detect_leaks=0",
        }
    return subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=600,
    )


def sanitizer() -> list[Path]:
    """What a process has to load before all else for a library that was built with `WATCHED`.

    Empty: g++ has no address sanitizer here.
    """
    found = []
    for name in ("libasan.so", "libstdc++.so"):
        asked = ["g++", f"-print-file-name={name}"]
        said = subprocess.run(asked, capture_output=True, text=True, check=True)
        found.append(Path(said.stdout.strip()))
    return found if all(path.is_absolute() for path in found) else []


def main() -> int:
    library, kernel, cases = sys.argv[1:]
    emulator = Emulator(Path(library))
    options = {"rows": (128,), "block_keys": WGMMA_BLOCK_KEYS} if kernel == "wgmma" else {}
    options |= {"fp8": kernel == "fp8"}
    kernel = "mma" if kernel == "fp8" else kernel
    for seed in range(int(cases)):
        case = random_case(seed, head_sizes=(64,), dtypes=(torch.bfloat16,), **options)
        try:
            emulator.run(case.step, case.plan, kernel, case.rows, seed)
        except (AssertionError, HangError) as error:
            print(seed, repr(error))
            return WRONG
        if failure := case.failure():
            print(seed, failure)
            return WRONG
    return 0


if __name__ == "__main__":
    sys.exit(main())
