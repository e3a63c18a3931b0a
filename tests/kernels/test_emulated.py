# SPDX-License-Identifier: Apache-2.0
"""The kernels' own code, run on the host, against float64.

300 cases:

    STATEFUL_EMULATED_CASES=300 pytest tests/kernels/test_emulated.py
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from random import Random

import pytest
import torch
from cases import BLOCK_KEYS, WGMMA_BLOCK_KEYS, Case, expected_of, make_step, random_case
from emulator import WATCHED, Emulator, Params, build, cuda_headers
from random_steps import play, sanitizer

from vllm_stateful.attention.plan import Shape, make_plan

pytestmark = pytest.mark.skipif(cuda_headers() is None, reason="the CUDA headers are not here")
BATCHES = 8
CASES = int(os.environ.get("STATEFUL_EMULATED_CASES", "40"))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(build(tmp_path_factory.mktemp("emulator")))


def test_both_sides_have_the_same_structures(emulated: Emulator) -> None:
    assert emulated.sizes == [ctypes.sizeof(Params), 32, 32, 16, 8]


@pytest.mark.parametrize("batch", range(BATCHES))
def test_mma_against_the_oracle(emulated: Emulator, batch: int) -> None:
    for seed in range(batch, CASES, BATCHES):
        case = random_case(seed)
        emulated.run(case.step, case.plan, "mma", case.rows, seed)
        assert not case.failure()


@pytest.mark.parametrize("batch", range(BATCHES))
def test_fp8_against_the_oracle(emulated: Emulator, batch: int) -> None:
    for seed in range(batch, CASES, BATCHES):
        case = random_case(seed, fp8=True)
        emulated.run(case.step, case.plan, "mma", case.rows, seed)
        assert not case.failure()


@pytest.mark.parametrize("batch", range(BATCHES))
def test_wgmma_against_the_oracle(emulated: Emulator, batch: int) -> None:
    for seed in range(batch, CASES, BATCHES):
        case = random_case(seed, rows=(128,), block_keys=WGMMA_BLOCK_KEYS)
        emulated.run(case.step, case.plan, "wgmma", case.rows, seed)
        assert not case.failure()


@pytest.mark.parametrize("kernel", ["mma", "wgmma"])
@pytest.mark.parametrize("num_parts", [10, 70])
def test_a_tree_over_many_parts(emulated: Emulator, kernel: str, num_parts: int) -> None:
    """Of two levels and of three, with the fan-in that is compiled for devices."""
    rows, keys = (64, BLOCK_KEYS[64]) if kernel == "mma" else (128, WGMMA_BLOCK_KEYS[64])
    cached = num_parts * keys
    torch.manual_seed(cached)
    step = make_step(Random(cached), torch.bfloat16, 64, 4, 1, 16, [5], [cached], [])
    shape = Shape(num_parts, rows, keys, 1, 4, overhead=0, least_cost=1)
    plan = make_plan([5], [cached + 5], shape)
    assert plan.num_slots == num_parts
    case = Case(f"{num_parts} parts", step, plan, rows, *expected_of(step))
    emulated.run(step, plan, kernel, rows, seed=cached)
    assert not case.failure()


@pytest.mark.skipif(not sanitizer(), reason="g++ has no address sanitizer here")
def test_nothing_outside_of_an_allocation_is_touched(tmp_path: Path) -> None:
    """Of tensors, of the plan, or of shared memory: what masks hide from the comparison."""
    library = build(tmp_path, flags=WATCHED)
    for kernel in ("mma", "fp8", "wgmma"):
        done = play(library, kernel, CASES // 10, watched=True)
        assert done.returncode == 0, done.stdout + done.stderr
