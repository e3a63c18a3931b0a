# SPDX-License-Identifier: Apache-2.0
"""Patches for the API server that answer a request without the engine (response cache).

Each wrapper gets vLLM's function and our hooks (`Hook`), and returns the replacement.
"""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch


def _response_request(original: Callable[..., Any], is_answered: Hook) -> Callable[..., Any]:
    """Send a request to the engine only if it is not answered from memory or by one in flight.

    ``is_answered``: gets the client of the engine core and the request; returns whether the request
    is answered without the engine.
    """

    async def add_request_async(self: Any, request: Any) -> None:
        if not is_answered(self, request):
            await original(self, request)

    return add_request_async


def _response_abort(original: Callable[..., Any], left_to_abort: Hook) -> Callable[..., Any]:
    """Abort a request only if no other client waits for the same answer.

    ``left_to_abort``: gets the client of the engine core and the ids of the requests to abort;
    returns those that the engine may end.
    """

    async def abort_requests_async(self: Any, request_ids: list[str]) -> None:
        await original(self, left_to_abort(self, request_ids))

    return abort_requests_async


def _response_outputs(
    original: Callable[..., Any], with_followers: Hook, stopped: Hook
) -> Callable[..., Any]:
    """Add outputs for following requests to those of the engine, before they become text.

    ``with_followers``: gets the outputs of the engine; returns them together with the outputs for
    other requests.

    ``stopped``: gets the ids of requests that a stop string ended, before the engine is told to
    abort them.
    """

    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = with_followers(engine_core_outputs)
        processed = original(self, outputs, *args, **kwargs)
        if processed.reqs_to_abort:
            stopped(processed.reqs_to_abort)
        return processed

    return process_outputs


def _response_forget(original: Callable[..., Any], begins: Hook, done: Hook) -> Callable[..., Any]:
    """Watch calls to the engine core that may make earlier answers wrong: new weights, for example.

    ``begins``: gets the client and the name of the call, before the call is made.

    ``done``: gets the client, the name of the call and the engine, after the call. The caller waits
    for it, too.
    """

    async def _call_utility_async(self: Any, method: str, *args: Any, engine: Any) -> Any:
        begins(self, method)
        try:
            return await original(self, method, *args, engine=engine)
        finally:
            await done(self, method, engine)

    return _call_utility_async


PATCHES = (
    Patch(
        name="response-request",
        target="vllm.v1.engine.core_client:AsyncMPClient.add_request_async",
        wrap=_response_request,
        calls=(Hook("vllm_stateful.adapters.frontend.response_cache:is_answered"),),
        symptom="A greedy request that was answered a moment ago, or is being answered right now, "
        "is computed once more in full.",
        reason="Below this point a request is a message; above it each endpoint has a way of its "
        "own to make a stream of an answer. No plugin may stand between the two.",
        feature="responses",
        process="api",
        signature="async (self, request)",
        upstream="vllm-0.32/0013-response-cache.patch",
        remove_when="a plugin can answer an EngineCoreRequest in the place of the engine core.",
    ),
    Patch(
        name="response-abort",
        target="vllm.v1.engine.core_client:AsyncMPClient.abort_requests_async",
        wrap=_response_abort,
        calls=(Hook("vllm_stateful.adapters.frontend.response_cache:left_to_abort"),),
        symptom="None in stock vLLM: part of response-request.",
        reason="The engine must go on with a request that others follow, and knows none that "
        "follows.",
        feature="responses",
        process="api",
        signature="async (self, request_ids)",
        upstream="vllm-0.32/0013-response-cache.patch",
        remove_when="a plugin can answer an EngineCoreRequest in the place of the engine core.",
    ),
    Patch(
        name="response-outputs",
        target="vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
        wrap=_response_outputs,
        calls=(
            Hook("vllm_stateful.adapters.frontend.response_cache:with_followers"),
            Hook("vllm_stateful.adapters.frontend.response_cache:stopped"),
        ),
        symptom="None in stock vLLM: part of response-request.",
        reason="An answer is remembered as the engine gave it, and given to all who asked for it. "
        "Only here is an answer that a stop string ended told from a client that has gone.",
        feature="responses",
        process="api",
        signature="(self, engine_core_outputs, engine_core_timestamp=..., iteration_stats=..., "
        "weight_version=...)",
        upstream="vllm-0.32/0013-response-cache.patch",
        remove_when="a plugin can answer an EngineCoreRequest in the place of the engine core.",
    ),
    Patch(
        name="response-forget",
        target="vllm.v1.engine.core_client:AsyncMPClient._call_utility_async",
        wrap=_response_forget,
        calls=(
            Hook("vllm_stateful.adapters.frontend.response_cache:called"),
            Hook("vllm_stateful.adapters.frontend.response_cache:done"),
        ),
        symptom="None in stock vLLM: part of response-request.",
        reason="Weight updates, adapters, sleep and resets all pass here, and nowhere else "
        "together.",
        feature="responses",
        process="api",
        signature="async (self, method, *args, engine)",
        upstream="vllm-0.32/0013-response-cache.patch",
        remove_when="a plugin can answer an EngineCoreRequest in the place of the engine core.",
    ),
)
