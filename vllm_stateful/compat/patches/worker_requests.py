# SPDX-License-Identifier: Apache-2.0
"""A speculator is not told which requests come, nor what the scheduler has for it."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any, Any], None]] = Hook("worker-requests")
"""Gets the model runner and the SchedulerOutput; its new requests have their rows."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_requests(self: Any, scheduler_output: Any) -> None:
        original(self, scheduler_output)
        if (fn := hook.fn) is not None:
            fn(self, scheduler_output)

    return add_requests


PATCH = Patch(
    name="worker-requests",
    target="vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests",
    wrap=_wrap,
    symptom="A drafter on the device knows a request's own tokens, and nothing that its agent "
    "said in other requests.",
    reason="propose() gets the batch, not the SchedulerOutput, and no other member of a "
    "speculator is called in a step.",
    feature="device-drafts",
    process="worker",
    signature="(self, scheduler_output)",
    upstream="vllm-0.32/0015-device-drafts.patch",
    remove_when="a speculator sees the SchedulerOutput.",
)
