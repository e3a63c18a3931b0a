# SPDX-License-Identifier: Apache-2.0
"""``await engine_core.call_utility_async("stateful", operation, arguments)``.

vLLM looks utility methods up by name on the engine core and runs them on its thread, between
two steps. Arguments and result travel as msgpack, so keep both to plain types: dict, list, str,
int, float, bool, bytes, None. An error comes back to the caller as its message.
"""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import CompatError, Patch

hook: Hook[Callable[[Any, str, dict[str, Any]], dict[str, Any]]] = Hook("engine-utility")
"""Gets the EngineCore, the operation and its arguments; returns the result."""


def _wrap(_: None) -> Callable[..., dict[str, Any]]:
    # Annotations are real types: vLLM decodes arguments whose annotation is a msgspec.Struct.
    def stateful(self: Any, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run an operation of vllm_stateful on the engine core's thread."""
        if (fn := hook.fn) is None:
            raise CompatError(f"stateful operation {operation!r}: no adapter is installed here")
        return fn(self, operation, arguments)

    return stateful


PATCH = Patch(
    name="engine-utility",
    target="vllm.v1.engine.core:EngineCore.stateful",
    wrap=_wrap,
    symptom="The API process cannot ask a plugin in the engine core anything.",
    reason="Utility calls reach methods of EngineCore by name and a plugin has no name there; "
    "collective_rpc reaches the workers, not the scheduler.",
    feature="utility",
    process="engine",
    signature="(self, operation, arguments)",
    upstream="vllm-0.32/0005-engine-utility.patch",
    remove_when="a plugin can register a named operation of the engine core.",
    adds=True,
)
