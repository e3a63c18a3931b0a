# SPDX-License-Identifier: Apache-2.0
"""Model runner V2 takes the ids of a prompt as a list of Python integers only."""

from collections.abc import Callable
from typing import Any

import numpy as np

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any, int, int, Any], None]] = Hook("staged-ids")
"""Gets the table, a row, a column and an int32 array that belongs there."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def stage_write(self: Any, index: int, start: int, x: Any) -> None:
        if (fn := hook.fn) is not None and isinstance(x, np.ndarray):
            fn(self, index, start, x)
        else:
            original(self, index, start, x)

    return stage_write


PATCH = Patch(
    name="staged-ids",
    target="vllm.v1.worker.gpu.buffer_utils:StagedWriteTensor.stage_write",
    wrap=_wrap,
    symptom="A prompt of 100k tokens is pickled twice for every worker, unpickled twice and "
    "converted there: 12 ms, every turn (2 ms where the engine core holds the worker).",
    reason="The row that they end in is int32, but what is staged for it is a list.",
    feature="worker-ids",
    process="worker",
    signature="(self, index, start, x)",
    upstream="vllm-0.32/0009-worker-ids.patch",
    remove_when="vLLM sends prompts to its workers as arrays.",
)
