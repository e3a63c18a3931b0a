# SPDX-License-Identifier: Apache-2.0
"""Patches for both ends of the transport, which sends prompts to the engine core.

Each wrapper gets vLLM's function and our hooks (`Hook`), and returns the replacement.
"""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch


def _prompt_send(original: Callable[..., Any], pack: Hook) -> Callable[..., Any]:
    """Send only the new part of a prompt to the engine core; stock vLLM sends all of it each turn.

    ``pack``: gets the client, the message type, the message and the engine; returns what to
    encode.
    """

    def _send_input(self: Any, request_type: Any, request: Any, engine: Any = None) -> Any:
        packed = pack(self, request_type, request, engine)
        return original(self, request_type, packed, engine)

    return _send_input


def _prompt_answers(original: Callable[..., Any], take_misses: Hook) -> Callable[..., Any]:
    """Send a prompt again whose base the engine core does not hold, unseen by the client.

    ``take_misses``: gets the client and the engine's outputs, takes the misses out of them, and
    returns the requests to send again.
    """

    async def get_output_async(self: Any) -> Any:
        outputs = await original(self)
        for request in take_misses(self, outputs):
            await self.add_request_async(request)
        return outputs

    return get_output_async


def _prompt_handover(original: Callable[..., Any], receive: Hook) -> Callable[..., Any]:
    """Process only the new part of a prompt; stock vLLM decodes, hashes and converts all of it.

    ``receive``: gets the engine core, the request and the original method; returns what the
    original method returns.
    """

    def preprocess_add_request(self: Any, request: Any) -> Any:
        return receive(self, request, original)

    return preprocess_add_request


def _prompt_miss(original: Callable[..., Any], answer: Hook) -> Callable[..., Any]:
    """Answer in band, not by an error, if the engine core does not hold the base of a prompt.

    ``answer``: gets the engine core and the request while the exception is handled; returns whether
    it has answered the client.
    """

    def _handle_request_preproc_error(self: Any, request: Any) -> None:
        if not answer(self, request):
            original(self, request)

    return _handle_request_preproc_error


PATCHES = (
    Patch(
        name="prompt-send",
        target="vllm.v1.engine.core_client:AsyncMPClient._send_input",
        wrap=_prompt_send,
        calls=(Hook("vllm_stateful.adapters.frontend.prompt_sender:pack"),),
        symptom="A turn that adds 700 tokens to 100k sends 100k integers over ZMQ: encoding, "
        "sending, decoding and copying them takes 5 to 10 ms on the way to the engine.",
        reason="The engine core has no notion of a prompt that continues another one, and nothing "
        "between the request and the socket can be extended.",
        feature="transport",
        process="api",
        signature="(self, request_type, request, engine=...)",
        upstream="vllm-0.32/0008-prompt-transport.patch",
        remove_when="a plugin can encode and decode the requests to the engine core.",
    ),
    Patch(
        name="prompt-answers",
        target="vllm.v1.engine.core_client:AsyncMPClient.get_output_async",
        wrap=_prompt_answers,
        calls=(Hook("vllm_stateful.adapters.frontend.prompt_sender:take_misses"),),
        symptom="None in stock vLLM: the other half of prompt-send.",
        reason="An engine that gave up the base of a prompt says so in band, as vLLM does for its "
        "multimodal cache; the whole prompt is sent before the caller notices.",
        feature="transport",
        process="api",
        signature="async (self)",
        upstream="vllm-0.32/0008-prompt-transport.patch",
        remove_when="a plugin can encode and decode the requests to the engine core.",
    ),
    Patch(
        name="prompt-handover",
        target="vllm.v1.engine.core:EngineCore.preprocess_add_request",
        wrap=_prompt_handover,
        calls=(Hook("vllm_stateful.adapters.engine.prompt_receiver:receive"),),
        symptom="For 700 new tokens after 100k, the engine core computes the hashes of all blocks "
        "again (9 ms at block size 16).",
        reason="`Request` is built from the complete prompt, with no room for hashes that are "
        "known; and a prompt that came as a delta has to be put together before that.",
        feature="transport",
        process="engine",
        signature="(self, request)",
        upstream="vllm-0.32/0008-prompt-transport.patch",
        remove_when="a plugin can encode and decode the requests to the engine core.",
    ),
    Patch(
        name="prompt-miss",
        target="vllm.v1.engine.core:EngineCoreProc._handle_request_preproc_error",
        wrap=_prompt_miss,
        calls=(Hook("vllm_stateful.adapters.engine.prompt_receiver:answer_miss"),),
        symptom="None in stock vLLM: the engine's half of prompt-answers.",
        reason="What goes wrong before a request is queued is reported here; a missing base is to "
        "be answered, not logged as an unexpected error.",
        feature="transport",
        process="engine",
        signature="(self, request)",
        upstream="vllm-0.32/0008-prompt-transport.patch",
        remove_when="a plugin can encode and decode the requests to the engine core.",
    ),
)
