# SPDX-License-Identifier: Apache-2.0
"""Plans of different steps in one place: what a CUDA graph replays over it is right each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Case, random_case
from emulator import FEW, Emulator, build, cuda_headers

from vllm_stateful.attention.ops import DevicePlan
from vllm_stateful.attention.plan import Plan, Shape, make_plan
from vllm_stateful.attention.workspace import GraphWorkspace

HOST = torch.device("cpu")
TABLES = ("cta_segments", "segments", "units", "groups", "members")
SHAPE = Shape(num_ctas=5, tile_rows=32, block_keys=64, num_kv_heads=2, group_size=4)


def alike(num_cases: int) -> list[Case]:
    """Steps that one launch could serve, but for their strides."""
    found = (random_case(seed, rows=(32,), head_sizes=(64,)) for seed in range(200))
    cases = (case for case in found if len(case.plan.cta_segments) == SHAPE.num_ctas + 1)
    return [case for case, _ in zip(cases, range(num_cases), strict=False)]


def on_host(plan: DevicePlan) -> Plan:
    arrays = {name: getattr(plan, name).numpy() for name in TABLES}
    return Plan(**arrays, num_slots=len(plan.partial_lse))


def addresses(plan: DevicePlan) -> list[int]:
    names = (*TABLES, "partial_out", "partial_lse", "arrivals")
    return [getattr(plan, name).data_ptr() for name in names]


@pytest.mark.skipif(cuda_headers() is None, reason="the CUDA headers are not here")
def test_each_plan_is_what_a_replayed_launch_follows(tmp_path: Path) -> None:
    emulator, cases = Emulator(build(tmp_path, flags=FEW)), alike(12)
    cases = [case for case in cases if case.step.out.dtype == torch.bfloat16]
    assert {bool(len(case.plan.groups)) for case in cases} == {True, False}
    most_units = max(len(case.plan.units) for case in cases)
    there = GraphWorkspace(SHAPE.tile_rows, SHAPE.num_ctas, most_units, 64, HOST)
    places = addresses(there.plan)
    for seed, case in enumerate(cases):
        assert there.fits(case.plan)
        assert addresses(there.upload(case.plan)) == places
        emulator.run(case.step, on_host(there.plan), "mma", case.rows, seed)
        assert not case.failure()


@pytest.mark.parametrize("num_sequences", [1, 7, 64])
@pytest.mark.parametrize("cached", [0, 100, 100_000])
def test_every_plan_without_shared_prefixes_fits(num_sequences: int, cached: int) -> None:
    new = np.full(num_sequences, 8)
    plan = make_plan(new, new + cached, SHAPE, exact=False)
    most_units = num_sequences * SHAPE.num_kv_heads
    assert GraphWorkspace(32, SHAPE.num_ctas, most_units, 64, HOST).fits(plan)


def test_a_plan_that_does_not_fit_is_refused() -> None:
    there = GraphWorkspace(32, SHAPE.num_ctas, 2, 64, HOST)
    plan = make_plan([8, 8], [80, 80], SHAPE)
    assert not there.fits(plan)
    with pytest.raises(ValueError, match="does not fit"):
        there.upload(plan)
