# SPDX-License-Identifier: Apache-2.0
"""Ids written into a row of a table and read back, in Triton's interpreter: a script of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import on_host  # noqa: F401
import torch

from vllm_stateful.adapters.worker.row_kernel import ROW_BLOCK
from vllm_stateful.adapters.worker.staged_ids import write_ids

COUNTS = (0, 1, ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 1, 4 * ROW_BLOCK + 225)


def main() -> None:
    for count in COUNTS:
        for start in (0, 7):
            table: Any = SimpleNamespace(gpu=torch.zeros(3, 5000, dtype=torch.int32), device="cpu")
            ids = np.arange(1, count + 1, dtype=np.int32)
            write_ids(table, 1, start, ids)
            expected = torch.zeros(3, 5000, dtype=torch.int32)
            expected[1, start : start + count] = torch.from_numpy(ids)
            assert torch.equal(table.gpu, expected), (count, start)
    print("all right")


if __name__ == "__main__":
    main()
