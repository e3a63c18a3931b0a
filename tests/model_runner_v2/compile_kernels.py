# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402
"""Compile the look-up kernels for GPUs; none is needed. A script of its own: nothing interprets."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False), compiler=None)

from vllm_stateful.adapters.worker import (  # vLLM looks for its drivers once
    lookup_kernels,
    row_kernel,
)
from vllm_stateful.speculate.answer_buffer import MAX_MATCH

del backends["cpu"]

SIZES = {"MAX_MATCH": MAX_MATCH}
DRAFTS = SIZES | {"K": 6, "K_BLOCK": 8}
KERNELS = {
    "find_kernel": {"OWN": True, "BLOCK": lookup_kernels.BLOCK, **SIZES},
    "find_kernel, answers": {"OWN": False, "BLOCK": lookup_kernels.BLOCK, **SIZES},
    "draft_kernel": {"COLUMNS_BLOCK": 1024, **DRAFTS},
    "learn_kernel": DRAFTS,
    "weigh_kernel": {"K": 6, "K_BLOCK": 8},
    "choose_kernel": {"K": 6, "K_BLOCK": 8},
    "row_kernel": {"BLOCK": row_kernel.ROW_BLOCK},
}
TYPES = {
    "ends_ptr": "*i32",
    "stride": "i32",
    "states_ptr": "*i64",
    "lengths_ptr": "*i32",
    "num_sampled_ptr": "*i32",
    "num_rejected_ptr": "*i32",
    "last_ptr": "*i64",
    "answers_ptr": "*i32",
    "table_ptr": "*i32",
    "best_ptr": "*i32",
    "best_stride": "i32",
    "column": "i32",
    "num_own_columns": "i32",
    "num_columns": "i32",
    "counts_ptr": "*fp32",
    "drafts_ptr": "*i64",
    "chances_ptr": "*fp32",
    "both_ptr": "*i32",
    "margins_ptr": "*i32",
    "found_ptr": "*i64",
    "found_chances_ptr": "*fp32",
    "head_ptr": "*i64",
    "head_stride": "i32",
    "out_ptr": "*i64",
    "taken_ptr": "*i32",
    "num_drafts": "i32",
    "index": "i32",
    "start": "i32",
    "ids_ptr": "*i32",
    "count": "i32",
}


def main(capabilities: list[int]) -> None:
    for label, constants in KERNELS.items():
        name = label.split(",")[0]
        kernel = getattr(row_kernel if name == "row_kernel" else lookup_kernels, name)
        signature = {
            name: "constexpr" if name in constants else TYPES[name] for name in kernel.arg_names
        }
        for capability in capabilities:
            source = ASTSource(kernel, signature, constants)
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            print(label, capability, len(made.asm["cubin"]))


if __name__ == "__main__":
    main([int(each) for each in sys.argv[1:]])
