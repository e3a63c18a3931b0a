# SPDX-License-Identifier: Apache-2.0
"""Plays random steps with the Triton kernels in Triton's interpreter, in a process of its own.

Triton reads TRITON_INTERPRET when its kernels are defined. Only float16: the interpreter
multiplies bfloat16 wrongly.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from cases import random_case

from vllm_stateful.attention.ops import DevicePlan
from vllm_stateful.attention.triton_attention import delta_append_attention


def main() -> int:
    for seed in range(int(sys.argv[1])):
        case = random_case(seed, dtypes=(torch.float16,))
        if len(case.plan.groups):
            continue
        step = case.step
        delta_append_attention(
            step.q,
            step.k_new,
            step.v_new,
            step.cache,
            step.out,
            step.block_table,
            step.query_start,
            step.seq_lens,
            step.slot_mapping,
            DevicePlan.of(case.plan, case.rows, step.head_size, torch.device("cpu")),
            step.scale,
            soft_cap=step.soft_cap,
            window=step.window,
        )
        if failure := case.failure():
            print(failure)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
