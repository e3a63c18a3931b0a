# SPDX-License-Identifier: Apache-2.0
"""What the engine answers, seen before it becomes text, and what a stop string ended."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[list[Any]], list[Any]]] = Hook("response-outputs")
"""Gets outputs of the engine; returns them with those for other requests."""

stopped: Hook[Callable[[list[str]], None]] = Hook("response-stopped")
"""Gets the ids of requests that a stop string ended, before the engine is told to abort them."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if (fn := hook.fn) is not None:
            engine_core_outputs = fn(engine_core_outputs)
        processed = original(self, engine_core_outputs, *args, **kwargs)
        if processed.reqs_to_abort and (note := stopped.fn) is not None:
            note(processed.reqs_to_abort)
        return processed

    return process_outputs


PATCH = Patch(
    name="response-outputs",
    target="vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
    wrap=_wrap,
    symptom="None in stock vLLM: part of response-request.",
    reason="An answer is remembered as the engine gave it, and given to all who asked for it. Only "
    "here is an answer that a stop string ended told from a client that has gone.",
    feature="responses",
    process="api",
    signature="(self, engine_core_outputs, engine_core_timestamp=..., iteration_stats=..., "
    "weight_version=...)",
    upstream="vllm-0.32/0013-response-cache.patch",
    remove_when="a plugin can answer an EngineCoreRequest in the place of the engine core.",
)
