# SPDX-License-Identifier: Apache-2.0
"""A plugin's scheduler as the default, for both sync and async scheduling."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any, type[Any]], type[Any]]] = Hook("scheduler-class")
"""Gets the resolved SchedulerConfig and the class vLLM chose; returns the class to use."""


def _wrap(original: Callable[[Any], type[Any]]) -> Callable[[Any], type[Any]]:
    def get_scheduler_cls(self: Any) -> type[Any]:
        stock = original(self)
        return stock if (fn := hook.fn) is None else fn(self, stock)

    return get_scheduler_cls


PATCH = Patch(
    name="scheduler-class",
    target="vllm.config.scheduler:SchedulerConfig.get_scheduler_cls",
    wrap=_wrap,
    symptom="A plugin cannot be the default scheduler for both sync and async scheduling.",
    reason="`scheduler_cls` is one class, chosen by the user before async scheduling is "
    "resolved; the wrong base class costs the overlap of scheduling and execution. This method "
    "is the first place that knows both.",
    feature="sessions",
    process="engine",
    signature="(self)",
    upstream="vllm-0.32/0002-scheduler-class.patch",
    remove_when="a plugin can register a default scheduler per scheduling mode.",
)
