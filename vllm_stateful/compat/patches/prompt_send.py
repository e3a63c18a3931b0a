# SPDX-License-Identifier: Apache-2.0
"""Every turn sends the whole conversation to the engine core again."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any, Any, Any, Any], Any]] = Hook("prompt-send")
"""Gets the client, the message type, the message and the engine; returns what to encode."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def _send_input(self: Any, request_type: Any, request: Any, engine: Any = None) -> Any:
        if (fn := hook.fn) is not None:
            request = fn(self, request_type, request, engine)
        return original(self, request_type, request, engine)

    return _send_input


PATCH = Patch(
    name="prompt-send",
    target="vllm.v1.engine.core_client:AsyncMPClient._send_input",
    wrap=_wrap,
    symptom="A turn that adds 700 tokens to 100k sends 100k integers over ZMQ: encoding, "
    "sending, decoding and copying them takes 5 to 10 ms on the way to the engine.",
    reason="The engine core has no notion of a prompt that continues another one, and nothing "
    "between the request and the socket can be extended.",
    feature="transport",
    process="api",
    signature="(self, request_type, request, engine=...)",
    upstream="vllm-0.32/0008-prompt-transport.patch",
    remove_when="a plugin can encode and decode the requests to the engine core.",
)
