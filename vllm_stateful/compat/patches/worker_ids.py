# SPDX-License-Identifier: Apache-2.0
"""Every prompt goes to the workers as a list of Python integers."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any, Any, bool], tuple[Any, Any]]] = Hook("worker-ids")
"""Gets the request, all of its ids where it goes to model runner V2 (else None), and whether the
model uses M-RoPE; returns the ids to send, of the prompt and all."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_request(
        cls: Any,
        request: Any,
        block_ids: Any,
        prefill_token_ids: Any = None,
        uses_mrope: bool = False,
    ) -> Any:
        made = original(cls, request, block_ids, prefill_token_ids, uses_mrope)
        if (fn := hook.fn) is not None:
            made.prompt_token_ids, made.prefill_token_ids = fn(
                request, made.prefill_token_ids, uses_mrope
            )
        return made

    return from_request


PATCH = Patch(
    name="worker-ids",
    target="vllm.v1.core.sched.output:NewRequestData.from_request",
    wrap=_wrap,
    symptom="Pickling, unpickling and copying the ids of a 100k-token prompt takes the engine "
    "core and each worker 3 ms, every turn.",
    reason="The row that they end in is int32 already, but the dataclass is built from the list.",
    feature="worker-ids",
    process="engine",
    signature="(cls, request, block_ids, prefill_token_ids=..., uses_mrope=...)",
    upstream="vllm-0.32/0009-worker-ids.patch",
    remove_when="vLLM sends prompts to its workers as arrays.",
)
