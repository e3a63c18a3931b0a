# SPDX-License-Identifier: Apache-2.0
"""A prompt whose base the engine core does not hold: an answer in band, not an error."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any, Any], bool]] = Hook("prompt-miss")
"""Gets the engine core and the request, while the exception is being handled; returns whether
it answered the client."""


def _wrap(original: Callable[..., None]) -> Callable[..., None]:
    def _handle_request_preproc_error(self: Any, request: Any) -> None:
        if (fn := hook.fn) is None or not fn(self, request):
            original(self, request)

    return _handle_request_preproc_error


PATCH = Patch(
    name="prompt-miss",
    target="vllm.v1.engine.core:EngineCoreProc._handle_request_preproc_error",
    wrap=_wrap,
    symptom="None in stock vLLM: the engine's half of prompt-answers.",
    reason="What goes wrong before a request is queued is reported here; a missing base is to be "
    "answered, not logged as an unexpected error.",
    feature="transport",
    process="engine",
    signature="(self, request)",
    upstream="vllm-0.32/0008-prompt-transport.patch",
    remove_when="a plugin can encode and decode the requests to the engine core.",
)
