# SPDX-License-Identifier: Apache-2.0
"""Who sent a request, carried to the engine: the last stop before it leaves the API process.

``InputProcessor.process_inputs_async`` is this same function in a thread pool: the bound method
is taken when an InputProcessor is built, so this patch must be applied before that, and there
the caller's context variables are not visible. HTTP requests arrive rendered and do not use it.
"""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any], Any]] = Hook("request-identity")
"""Gets the finished EngineCoreRequest; may change it, and returns the one to send."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        return request if (fn := hook.fn) is None else fn(request)

    return process_inputs


PATCH = Patch(
    name="request-identity",
    target="vllm.v1.engine.input_processor:InputProcessor.process_inputs",
    wrap=_wrap,
    symptom="The API key of a request never reaches the engine, so two tenants share KV blocks.",
    reason="`cache_salt` would keep them apart, but only clients can set it, and nothing between "
    "the HTTP request and the engine can be extended.",
    feature="sessions",
    process="api",
    signature="(self, request_id, prompt, params, supported_tasks, arrival_time=..., "
    "lora_request=..., tokenization_kwargs=..., trace_headers=..., priority=..., "
    "data_parallel_rank=..., resumable=..., session_id=..., kv_hints=...)",
    upstream="vllm-0.32/0004-request-identity.patch",
    remove_when="a plugin can see each EngineCoreRequest before it is sent.",
)
