# SPDX-License-Identifier: Apache-2.0
"""An attention backend is not told which requests it attends from."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any, Any], None]] = Hook("worker-batch")
"""Gets the InputBatch of a step, requests in their order, and its SchedulerOutput."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_inputs(
        self: Any,
        scheduler_output: Any,
        batch_req_state: Any,
        batch_desc: Any,
        num_active_loras: int,
    ) -> Any:
        batch = original(self, scheduler_output, batch_req_state, batch_desc, num_active_loras)
        if (fn := hook.fn) is not None:
            fn(batch, scheduler_output)
        return batch

    return prepare_inputs


PATCH = Patch(
    name="worker-batch",
    target="vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_inputs",
    wrap=_wrap,
    symptom="Eight sub-agents that share a prefix of 32k tokens read its keys eight times in each "
    "step: cascade attention wants a prefix that the whole batch shares.",
    reason="The scheduler knows who shares what; a metadata builder sees rows without their "
    "requests, and nothing of the SchedulerOutput. They are together only here.",
    feature="shared-prefixes",
    process="worker",
    signature="(self, scheduler_output, batch_req_state, batch_desc, num_active_loras)",
    upstream="vllm-0.32/0016-worker-batch.patch",
    remove_when="a metadata builder sees the SchedulerOutput and the order of its requests.",
)
