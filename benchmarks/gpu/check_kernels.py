# SPDX-License-Identifier: Apache-2.0
"""Random steps of tests/kernels through the compiled op on a device, against float64.

    python -m benchmarks.gpu.check_kernels mma|wgmma|fp8|shared|opcheck [--cases 300] [--out FILE]

``shared`` plays steps whose sequences share a prefix, with both kernels in turn. Two steps of three
are cut for the device's own grid, with longer caches; the third for a few thread blocks, as in the
emulator. Each is launched twice over the same plan and NaN-poisoned partial sums. The result of
each is in FILE as soon as it exists.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.limited import append_row
from vllm_stateful.attention import ops

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "kernels"))

from cases import BLOCK_KEYS, MOST_ERROR, WGMMA_BLOCK_KEYS, Case, arguments, bits, random_case

MMA: dict[str, Any] = {"block_keys": BLOCK_KEYS}
WGMMA: dict[str, Any] = {"rows": (128,), "block_keys": WGMMA_BLOCK_KEYS}
KERNELS: dict[str, list[dict[str, Any]]] = {
    "mma": [MMA],
    "wgmma": [WGMMA],
    "fp8": [{**MMA, "fp8": True}],
    "shared": [{**MMA, "shared": True}, {**WGMMA, "shared": True}],
}
OPCHECK = "opcheck"
LONGEST = 4000  # cached keys of a sequence, on the device's grid
FAULTS = ("CUDA error", "an illegal")  # behind one of them the process cannot go on


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


def device_grid(dtype: torch.dtype, head_size: int, rows: int, *, fp8: bool) -> int:
    """Thread blocks that are resident on this device."""
    return ops.num_ctas(dtype, head_size, rows, 0, fp8=fp8)


def check(case: Case) -> dict[str, Any]:
    """Play a step twice.

    Returns:
        The worst relative error (infinite where something is NaN), whether the cache was right
        each time, counters that were not left at zero, and how many elements of the result are
        far off.
    """
    step = case.step
    plan = ops.DevicePlan.of(case.plan, case.rows, step.head_size, torch.device("cuda"))
    worst, is_cache_right, far = 0.0, True, 0
    for _ in range(2):  # the second launch meets the counters that the first one left
        plan.partial_out.fill_(float("nan"))
        plan.partial_lse.fill_(float("nan"))
        t = on_device(step)
        t["out"].fill_(float("nan"))
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
        rows = (out - case.expected).norm(dim=-1) / (case.expected.norm(dim=-1) + 1e-9)
        error = float((out - case.expected).norm() / case.expected.norm())
        worst = max(worst, error if error == error else float("inf"))
        far = max(far, int((~(rows < 2e-2)).sum()))
        is_cache_right &= torch.equal(bits(t["cache"].cpu()), bits(case.expected_cache))
    return {
        "error": worst,
        "cache": is_cache_right,
        "counters": int(plan.arrivals.count_nonzero()),
        "far": far,
        "parts": int(case.plan.units[:, 5].max()) if len(case.plan.units) else 0,
        "groups": len(case.plan.groups),
    }


def is_right(row: dict[str, Any]) -> bool:
    """Whether a step came out as it has to."""
    return "error" in row and row["error"] <= MOST_ERROR and row["cache"] and not row["counters"]


def checked_op() -> dict[str, Any]:
    """torch's own checks of the op's registration."""
    found = torch.library.opcheck(
        torch.ops.vllm_stateful.delta_append_attention.default,
        tuple(arguments("cuda")),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    return {"opcheck": found}


def main() -> int:
    """Check one kernel, print one line; 1 where a step is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kernel", choices=[*KERNELS, OPCHECK])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("out/check.jsonl"))
    parser.add_argument("--small", action="store_true", help="few thread blocks in every step")
    args = parser.parse_args()
    if reason := ops.why_unavailable():
        print(f"nothing is checked: {reason}", file=sys.stderr)
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.kernel == OPCHECK:
        row = checked_op()
        append_row(args.out, {"kernel": OPCHECK, **row})
        return 0 if set(row["opcheck"].values()) == {"SUCCESS"} else 1
    options, num_right = KERNELS[args.kernel], 0
    for seed in range(args.cases):
        on_grid = {} if args.small or seed % 3 == 0 else {"grid": device_grid, "longest": LONGEST}
        case = random_case(seed, **options[seed % len(options)], **on_grid)
        row = {"kernel": args.kernel, "seed": seed, "name": case.name}
        try:
            row |= check(case)
        except RuntimeError as error:
            row["failed"] = str(error)[:300]
        append_row(args.out, row)
        num_right += is_right(row)
        if any(fault in row.get("failed", "") for fault in FAULTS):
            print(f"{args.kernel}: {row['failed']} in seed {seed}")
            break
    print(f"{args.kernel}: {num_right} of {args.cases} steps are right")
    return 0 if num_right == args.cases else 1


if __name__ == "__main__":
    sys.exit(main())
