# SPDX-License-Identifier: Apache-2.0
"""Patches for the engine core.

Each wrapper gets vLLM's function and our hooks (`Hook`), and returns the replacement.
"""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch


def _scheduler_class(original: Callable[..., Any], choose: Hook) -> Callable[..., Any]:
    """Make our scheduler the default, for both sync and async scheduling.

    ``choose``: gets the class that vLLM chose; returns the class to use.
    """

    def get_scheduler_cls(self: Any) -> type[Any]:
        chosen: type[Any] = choose(original(self))
        return chosen

    return get_scheduler_cls


def _engine_utility(_original: None, answer: Hook) -> Callable[..., Any]:
    """Add the utility method ``stateful`` to the engine core.

    It is called by ``await engine_core.call_utility_async("stateful", operation, arguments)``. vLLM
    finds utility methods by name on the engine core and runs them on its thread, between two steps.
    Arguments and result are sent as msgpack, so use only plain types: dict, list, str, int, float,
    bool, bytes, None. Of an error, the caller gets the message.

    ``answer``: gets the EngineCore, the operation and its arguments; returns the result.
    """

    # The annotations must be real types: vLLM decodes arguments annotated with a msgspec.Struct.
    def stateful(self: Any, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run an operation of vllm_stateful on the engine core's thread."""
        result: dict[str, Any] = answer(self, operation, arguments)
        return result

    return stateful


def _worker_ids(original: Callable[..., Any], ids_of: Hook) -> Callable[..., Any]:
    """Send prompts to the workers as arrays; stock vLLM sends lists of Python integers.

    ``ids_of``: gets the request, all of its ids for model runner V2 (else None), and whether the
    model uses M-RoPE; returns the ids of the prompt and all ids, as they are sent.
    """

    def from_request(
        cls: Any,
        request: Any,
        block_ids: Any,
        prefill_token_ids: Any = None,
        uses_mrope: bool = False,
    ) -> Any:
        made = original(cls, request, block_ids, prefill_token_ids, uses_mrope)
        ids = ids_of(request, made.prefill_token_ids, uses_mrope)
        made.prompt_token_ids, made.prefill_token_ids = ids
        return made

    return from_request


PATCHES = (
    Patch(
        name="scheduler-class",
        target="vllm.config.scheduler:SchedulerConfig.get_scheduler_cls",
        wrap=_scheduler_class,
        calls=(Hook("vllm_stateful.adapters.engine.scheduler_choice:choose_scheduler"),),
        symptom="A plugin cannot be the default scheduler for both sync and async scheduling.",
        reason="`scheduler_cls` is one class, chosen by the user before async scheduling is "
        "resolved; the wrong base class costs the overlap of scheduling and execution. This method "
        "is the first place that knows both.",
        feature="sessions",
        process="engine",
        signature="(self)",
        upstream="vllm-0.32/0002-scheduler-class.patch",
        remove_when="a plugin can register a default scheduler per scheduling mode.",
    ),
    Patch(
        name="engine-utility",
        target="vllm.v1.engine.core:EngineCore.stateful",
        wrap=_engine_utility,
        calls=(Hook("vllm_stateful.adapters.engine.engine_utility:answer"),),
        symptom="The API process cannot ask a plugin in the engine core anything.",
        reason="Utility calls reach methods of EngineCore by name and a plugin has no name there; "
        "collective_rpc reaches the workers, not the scheduler.",
        feature="utility",
        process="engine",
        signature="(self, operation, arguments)",
        upstream="vllm-0.32/0005-engine-utility.patch",
        remove_when="a plugin can register a named operation of the engine core.",
        adds=True,
    ),
    Patch(
        name="worker-ids",
        target="vllm.v1.core.sched.output:NewRequestData.from_request",
        wrap=_worker_ids,
        calls=(Hook("vllm_stateful.adapters.engine.worker_ids:worker_ids"),),
        symptom="Pickling, unpickling and copying the ids of a 100k-token prompt takes the engine "
        "core and each worker 3 ms, every turn.",
        reason="The row that they end in is int32 already, but the dataclass is built from the "
        "list.",
        feature="worker-ids",
        process="engine",
        signature="(cls, request, block_ids, prefill_token_ids=..., uses_mrope=...)",
        upstream="vllm-0.32/0009-worker-ids.patch",
        remove_when="vLLM sends prompts to its workers as arrays.",
    ),
)
