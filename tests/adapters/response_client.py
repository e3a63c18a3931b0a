# SPDX-License-Identifier: Apache-2.0
"""vLLM's own client of the engine core between lists instead of sockets, answers remembered."""

import asyncio
import logging
from collections.abc import Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from test_response_key import request_of
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
)
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_stateful.adapters.engine.engine_utility import answer_epoch
from vllm_stateful.adapters.frontend import response_cache, turn_context
from vllm_stateful.adapters.frontend.response_cache import Responses
from vllm_stateful.adapters.frontend.turn_context import CacheControl, TurnContext
from vllm_stateful.compat.ledger import patch_of
from vllm_stateful.compat.patch import apply_all
from vllm_stateful.observe.response_counts import ResponseCounts
from vllm_stateful.transport.wire import EPOCH

PATCHES = [patch_of(f"response-{name}") for name in ("request", "abort", "forget")]


class Client(AsyncMPClient):
    """The real sending and receiving, between lists instead of sockets."""

    def __init__(self, max_bytes: int = 1 << 20, core: Any = None, num_clients: int = 1) -> None:
        self.core_engine, self.client_index = b"engine-0", 0
        self.client_count = num_clients
        self.core = SimpleNamespace() if core is None else core
        self.encoder = MsgpackEncoder()
        self.outputs_queue: Any = asyncio.Queue()
        self.utility_results: dict[int, Any] = {}
        self.resources: Any = SimpleNamespace(engine_dead=False)
        self.added: list[str] = []
        self.ended: list[str] = []
        self.stateful_responses = Responses(self, max_bytes)

    def __del__(self) -> None:
        """There is nothing to shut down."""

    def _ensure_output_queue_task(self) -> None:
        """No socket is read."""

    async def _send_input_message(self, message: Any, engine: Any) -> None:
        request_type, *frames = message
        if request_type == EngineCoreRequestType.ADD.value:
            self.added.append(MsgpackDecoder(EngineCoreRequest).decode(frames).request_id)
        elif request_type == EngineCoreRequestType.ABORT.value:
            self.ended += MsgpackDecoder().decode(frames)
        else:
            _, call_id, method, arguments = MsgpackDecoder().decode(frames)
            answer = None
            if method == "stateful" and arguments and arguments[0] == EPOCH:
                answer = answer_epoch(self.core, **arguments[1])
            self.utility_results[call_id].set_result(answer)

    async def ask(self, name: str, **changes: Any) -> None:
        await self.add_request_async(request_of(request_id=name, **changes))

    async def say(
        self, name: str, *tokens: int, last: FinishReason | None = None
    ) -> dict[str, Any]:
        """One step of the engine; what comes of it, by request."""
        output = EngineCoreOutput(name, list(tokens), finish_reason=last)
        self.outputs_queue.put_nowait(EngineCoreOutputs(outputs=[output]))
        return await self.got()

    async def got(self) -> dict[str, Any]:
        """All that waits to be read: token ids by request, the finish reason behind them."""
        found: dict[str, Any] = {}
        for _ in range(100):
            await asyncio.sleep(0)
            while not self.outputs_queue.empty():
                outputs = (await self.get_output_async()).outputs
                for output in response_cache.with_followers(outputs):
                    mine = found.setdefault(output.request_id, [])
                    mine += output.new_token_ids
                    mine += [] if output.finish_reason is None else [output.finish_reason]
        return found


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[ResponseCounts]:
    """Patched, from an HTTP request, with totals of this test alone."""
    made = ResponseCounts()
    monkeypatch.setattr(response_cache, "RESPONSE_COUNTS", made)
    apply_all(PATCHES, strict=True, log=logging.getLogger(__name__))
    over_http = TurnContext(cache_control=CacheControl(is_stored=True, is_looked_up=True))
    token = turn_context._current.set(over_http)
    response_cache._all.clear()
    yield made
    turn_context._current.reset(token)
    for patch in reversed(PATCHES):
        patch.undo()


def run(what: Coroutine[Any, Any, None]) -> None:
    asyncio.run(what)


STOP, LENGTH, ABORT = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT


async def answered(client: Client, name: str, *tokens: int) -> None:
    """One request to its end, at the engine."""
    await client.ask(name)
    await client.say(name, *tokens, last=STOP)


def two_servers() -> tuple[Client, Client]:
    core = SimpleNamespace()
    return Client(core=core, num_clients=2), Client(core=core, num_clients=2)
