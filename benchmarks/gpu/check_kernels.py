# SPDX-License-Identifier: Apache-2.0
"""The random steps of tests/kernels through the compiled op on a device, against float64; opcheck.

python -m benchmarks.gpu.check_kernels [--cases 300] [--seconds 120]
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from vllm_stateful.attention import ops

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "kernels"))

from cases import BLOCK_KEYS, MOST_ERROR, WGMMA_BLOCK_KEYS, Case, arguments, bits, random_case

KERNELS: dict[str, dict[str, Any]] = {
    "mma": {"block_keys": BLOCK_KEYS},
    "fp8": {"block_keys": BLOCK_KEYS, "fp8": True},
    "wgmma": {"rows": (128,), "block_keys": WGMMA_BLOCK_KEYS},
}


def on_device(step: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a step, its strides kept."""
    moved = {}
    for field in dataclasses.fields(step):
        value = getattr(step, field.name)
        if isinstance(value, torch.Tensor):
            there = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="cuda"
            )
            moved[field.name] = there.copy_(value)
    return moved


def scales_of(step: Any) -> ops.Scales | None:
    """Those of fp8."""
    return step.scales and ops.Scales(*(scale.cuda() for scale in step.scales))


def failure_of(case: Case) -> str:
    """What is wrong with the device's answer, twice over the same plan; empty: nothing."""
    step = case.step
    plan = ops.DevicePlan.of(case.plan, case.rows, step.head_size, torch.device("cuda"))
    for _ in range(2):  # the second launch meets the counters that the first one left
        t = on_device(step)
        ops.delta_append_attention(
            t["q"],
            t["k_new"],
            t["v_new"],
            t["cache"],
            t["out"],
            t["block_table"],
            t["query_start"],
            t["seq_lens"],
            t["slot_mapping"],
            plan,
            step.scale,
            soft_cap=step.soft_cap,
            window=step.window,
            scales=scales_of(step),
        )
        out = t["out"].cpu().double()
        error = float((out - case.expected).norm() / case.expected.norm())
        if not error <= MOST_ERROR:
            return f"relative error {error:.2e} in {case.name}"
        if not torch.equal(bits(t["cache"].cpu()), bits(case.expected_cache)):
            return f"the cache differs in {case.name}"
    return ""


def main() -> int:
    """Print one line for each kernel, and the first failures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no step after them")
    args = parser.parse_args()
    if reason := ops.why_unavailable():
        print(f"nothing is checked: {reason}", file=sys.stderr)
        return 1
    wrong: Counter[str] = Counter()
    began = time.monotonic()
    checked = torch.library.opcheck(
        torch.ops.vllm_stateful.delta_append_attention.default,
        tuple(arguments("cuda")),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    print(f"opcheck: {checked}")
    for number, (kernel, options) in enumerate(KERNELS.items(), 1):
        until = began + args.seconds * number / len(KERNELS)
        if kernel == "wgmma" and torch.cuda.get_device_capability()[0] != 9:
            print("wgmma: not on this device")
            continue
        played = 0
        for seed in range(args.cases):
            if time.monotonic() > until:
                break
            played += 1
            if failure := failure_of(random_case(seed, **options)):
                wrong[kernel] += 1
                if wrong[kernel] <= 3:
                    print(f"{kernel}: {failure}")
        print(f"{kernel}: {played - wrong[kernel]} of {played} steps are right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
