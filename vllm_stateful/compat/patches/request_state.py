# SPDX-License-Identifier: Apache-2.0
"""A turn goes on behind its last allowed tool call, or in a call that is already invalid."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any, Any], Any]] = Hook("request-state")
"""Gets vLLM's class of request states and an EngineCoreRequest; returns what makes its state,
that class or something with the same parameters."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_new_request(
        cls: Any,
        tokenizer: Any,
        request: Any,
        prompt: Any,
        parent_req: Any,
        request_index: Any,
        queue: Any,
        log_stats: Any,
        stream_interval: Any,
    ) -> Any:
        make = cls if (fn := hook.fn) is None else fn(cls, request)
        return original(
            make,
            tokenizer,
            request,
            prompt,
            parent_req,
            request_index,
            queue,
            log_stats,
            stream_interval,
        )

    return from_new_request


PATCH = Patch(
    name="request-state",
    target="vllm.v1.engine.output_processor:RequestState.from_new_request",
    wrap=_wrap,
    symptom="With parallel_tool_calls false or a named tool the model may go on behind the one "
    "call, and an invalid call is seen by nobody before its end.",
    reason="Where text appears and stop strings are found, nothing else can end a turn; logits "
    "processors see only token ids, and finish in the engine with no reason of their own.",
    feature="tool-call-check",
    process="api",
    signature="(cls, tokenizer, request, prompt, parent_req, request_index, queue, log_stats, "
    "stream_interval)",
    upstream="vllm-0.32/0014-request-state.patch",
    remove_when="a plugin can end a turn by its text and say why.",
)
