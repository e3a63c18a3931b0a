# SPDX-License-Identifier: Apache-2.0
"""Plays random steps with the kernels of a folder until one is wrong: a process for a mutation.

    python mutated.py SOURCES FOLDER KERNEL CASES

Exits with 0 when all steps came out right, with 3 when one did not.
"""

import sys
from pathlib import Path

import torch
from cases import WGMMA_BLOCK_KEYS, random_case
from emulator import Emulator, HangError

WRONG = 3


def main() -> int:
    sources, folder, kernel, cases = sys.argv[1:]
    few = ("-DSTATEFUL_EMULATE_FEW", "-O1")
    emulator = Emulator(Path(folder), Path(sources), few)
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
