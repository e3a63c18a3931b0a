# SPDX-License-Identifier: Apache-2.0
"""Wishes through vLLM's own routes: to the engine's request, and back into Anthropic's usage."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from vllm.entrypoints.anthropic.api_router import router as messages_router
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.openai.chat_completion.api_router import router as chat_router
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponse,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.openai.responses.api_router import router as responses_router
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from vllm_stateful.adapters.engine.turn import retention_wish
from vllm_stateful.adapters.frontend import sent_body
from vllm_stateful.adapters.frontend.anthropic_usage import with_cache_creation
from vllm_stateful.adapters.frontend.identity import identify, stamp
from vllm_stateful.adapters.frontend.request_validation import validate_plain_messages
from vllm_stateful.compat.ledger import patch_of
from vllm_stateful.transport.wire import RETAIN_ACTION, TURN_ACTION

HOUR = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
FIVE_MINUTES = {"cache_control": {"type": "ephemeral"}}
USER_ID = "user_ab12_account_x_session_0d3a9c52-6f1e-4b7a-8a55-2f6d0c9e7b11"

USAGE = {
    "prompt_tokens": 329,
    "completion_tokens": 5,
    "total_tokens": 334,
    "prompt_tokens_details": {"cached_tokens": 300, "created_cache_tokens": 20},
}


def chunk(**fields: Any) -> str:
    made = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}
    return f"data: {json.dumps({**made, **fields})}\n\n"


def choice(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    delta = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


class Engine:
    """Stands where vLLM's handlers do: keeps the engine's requests, answers always the same."""

    def __init__(self) -> None:
        self.seen: list[EngineCoreRequest] = []
        self.usage: dict[str, Any] = USAGE
        self.fails = False

    def ask(self, request: Any, raw_request: Request) -> None:
        stock = GenerateBaseServing._get_session_id(request, raw_request)
        session_id = identify(request, raw_request, stock)
        made = EngineCoreRequest(
            request_id="request-1",
            prompt_token_ids=[1],
            mm_features=None,
            sampling_params=SamplingParams(),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            session_id=session_id,
        )
        self.seen.append(stamp(made))

    async def create_chat_completion(self, request: Any, raw_request: Request) -> Any:
        self.ask(request, raw_request)
        if self.fails:
            return ErrorResponse(error=ErrorInfo(message="no", type="t", code=400))
        if request.stream:
            return self.stream()
        message = {"role": "assistant", "content": "grüße"}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return ChatCompletionResponse(model="m", choices=choices, usage=self.usage)

    async def stream(self) -> AsyncGenerator[str, None]:
        first = {"prompt_tokens": 329, "total_tokens": 329, "completion_tokens": 0}
        yield chunk(**choice(""), usage=first)
        yield chunk(**choice("grüße event: message_delta"))
        yield chunk(**choice("", "stop"))
        yield chunk(usage=self.usage)
        yield "data: [DONE]\n\n"

    async def create_responses(self, request: Any, raw_request: Request) -> Any:
        self.ask(request, raw_request)
        return ErrorResponse(error=ErrorInfo(message="no", type="t", code=400))


class Server:
    """vLLM's routes over one `Engine`."""

    def __init__(self) -> None:
        self.engine = Engine()
        app = FastAPI()
        for router in (messages_router, chat_router, responses_router):
            app.include_router(router)
        assert validate_plain_messages(app)
        messages = object.__new__(AnthropicServingMessages)
        messages._merge_inline_system = False
        self.messages = messages
        messages.disabled_thinking_effort_resolver = AsyncMock()  # from vLLM 0.33 on
        messages.create_chat_completion = self.completion_for(messages)
        app.state.anthropic_serving_messages = messages
        app.state.openai_serving_chat = app.state.openai_serving_responses = self.engine
        app.state.enable_server_load_tracking = False
        self.client = TestClient(app)

    def completion_for(self, messages: Any) -> Any:
        """What is behind the Messages route. From vLLM 0.33 on it converts a stream itself."""
        if "chat_completion_stream_generator" not in vars(AnthropicServingMessages):
            return self.engine.create_chat_completion

        async def parsed(events: AsyncGenerator[str, None]) -> AsyncGenerator[Any, None]:
            async for event in events:
                if "[DONE]" not in event:
                    data = event.removeprefix("data: ")
                    yield ChatCompletionStreamResponse.model_validate_json(data)

        async def create(request: Any, raw_request: Request) -> Any:
            made = await self.engine.create_chat_completion(request, raw_request)
            is_stream = hasattr(made, "__aiter__")
            return messages.message_stream_converter(parsed(made)) if is_stream else made

        return create

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self.client.post(path, json={"model": "m", **body})

    def wish_for(self, path: str, body: dict[str, Any]) -> float | None:
        """What the engine is told."""
        self.post(path, body)
        return retention_wish(self.engine.seen[-1])  # type: ignore[arg-type]

    def answer(self, **fields: Any) -> Any:
        return self.post("/v1/messages", anthropic(**fields))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("VLLM_STATEFUL_TENANT", raising=False)
    patch = patch_of("anthropic-usage")
    was_applied = patch.is_applied
    patch.apply()
    yield Server()
    if not was_applied:
        patch.undo()


def anthropic(**fields: Any) -> dict[str, Any]:
    return {"max_tokens": 5, "messages": [{"role": "user", "content": "hi"}], **fields}


def text(**extra: Any) -> dict[str, Any]:
    return {"type": "text", "text": "hi", **extra}


def result(**extra: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "a", "content": [text(**extra)]}


CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"

WISHES: list[tuple[str, dict[str, Any], float | None]] = [
    (MESSAGES, anthropic(), None),
    (MESSAGES, anthropic(**HOUR), 3600),
    (MESSAGES, anthropic(system=[text(**HOUR)]), 3600),
    (MESSAGES, anthropic(tools=[{"name": "f", "input_schema": {}, **HOUR}]), 3600),
    (MESSAGES, anthropic(messages=[{"role": "user", "content": [text(**FIVE_MINUTES)]}]), 300),
    (MESSAGES, anthropic(messages=[{"role": "user", "content": [result(**HOUR)]}]), 3600),
    (MESSAGES, anthropic(messages=[{"role": "user", "content": "hi"}] * 40, **HOUR), 3600),
    (MESSAGES, anthropic(system=[text(cache_control={"type": 7})]), None),
    (CHAT, anthropic(prompt_cache_retention="24h"), 86_400),
    (CHAT, anthropic(prompt_cache_retention="in_memory"), 600),
    (CHAT, anthropic(prompt_cache_retention="for ever"), None),
    (CHAT, anthropic(messages=[{"role": "user", "content": [text(**HOUR)]}]), 3600),
    (CHAT, anthropic(messages=[{"role": "user", "content": "hi", **FIVE_MINUTES}] * 40), 300),
    (CHAT, anthropic(), None),
    (RESPONSES, {"input": "hi", "prompt_cache_retention": "24h"}, 86_400),
    (RESPONSES, {"input": "hi"}, None),
]


@pytest.mark.parametrize(("path", "body", "seconds"), WISHES)
def test_a_wish_reaches_the_engine(
    server: Server, path: str, body: dict[str, Any], seconds: float | None
) -> None:
    assert server.wish_for(path, body) == seconds
    hints = server.engine.seen[-1].kv_hints
    said = [] if hints is None else [action.action_type for action in hints.actions]
    assert (RETAIN_ACTION in said) == (seconds is not None)


def test_a_streamed_request_has_its_wish_too(server: Server) -> None:
    assert server.wish_for(MESSAGES, anthropic(stream=True, **HOUR)) == 3600


def test_the_session_in_anthropic_metadata_is_found(server: Server) -> None:
    server.answer(metadata={"user_id": USER_ID})
    assert server.engine.seen[-1].session_id == f"metadata-user-id:{USER_ID.rpartition('_')[2]}"


@pytest.mark.parametrize("is_merging", [False, True])
def test_merged_system_messages_are_told(server: Server, is_merging: bool) -> None:
    """vLLM puts them into the first one, where the template wants the only one in front."""
    server.messages._merge_inline_system = is_merging
    reminder = {"role": "system", "content": "be brief"}
    user, answer = ({"role": role, "content": "hi"} for role in ("user", "assistant"))
    server.answer(system="you", messages=[user, reminder, answer, user, reminder, user])
    hints = server.engine.seen[-1].kv_hints
    told = {} if hints is None else {each.action_type: each.payload for each in hints.actions}
    assert told.get(TURN_ACTION, {}).get("merged", 0) == 2 * is_merging


# ---- usage -----------------------------------------------------------------------------------

COUNTS = {
    "input_tokens": 9,
    "output_tokens": 5,
    "cache_creation_input_tokens": 20,
    "cache_read_input_tokens": 300,
}


def split(five_minutes: int, one_hour: int) -> dict[str, Any]:
    counts = {"ephemeral_5m_input_tokens": five_minutes, "ephemeral_1h_input_tokens": one_hour}
    return {"cache_creation": counts}


CASES = [
    ({}, {}),
    (HOUR, split(0, 20)),
    (FIVE_MINUTES, split(20, 0)),
    ({**HOUR, "system": [text(**FIVE_MINUTES)]}, split(0, 20)),
    ({"cache_control": {"type": "ephemeral", "ttl": "2h"}}, {}),
    ({"prompt_cache_retention": "24h"}, {}),
]


@pytest.mark.parametrize(("fields", "added"), CASES)
def test_usage_says_for_how_long_what_was_written_is_kept(
    server: Server, fields: dict[str, Any], added: dict[str, Any]
) -> None:
    plain, answer = server.answer().json(), server.answer(**fields).json()
    assert plain["usage"] == COUNTS
    assert answer["usage"] == COUNTS | added
    assert {**answer, "usage": 0, "id": 0} == {**plain, "usage": 0, "id": 0}


def events(reply: Any) -> list[tuple[str, Any]]:
    parts = [part.split("\n") for part in reply.text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data[6:])) for name, data in parts]


@pytest.mark.parametrize(("fields", "added"), CASES)
def test_a_stream_says_so_with_its_last_counts(
    server: Server, fields: dict[str, Any], added: dict[str, Any]
) -> None:
    plain, reply = server.answer(stream=True), server.answer(stream=True, **fields)
    if not added:
        assert reply.text == plain.text
    last = dict(events(reply))["message_delta"]
    assert last["usage"] == COUNTS | added
    assert last["delta"] == dict(events(plain))["message_delta"]["delta"]
    others = [event for event in events(reply) if event[0] != "message_delta"]
    assert others == [event for event in events(plain) if event[0] != "message_delta"]
    assert dict(others)["message_start"]["message"]["usage"] == {
        "input_tokens": 329,
        "output_tokens": 0,
    }


def test_without_numbers_of_the_cache_nothing_is_added(server: Server) -> None:
    server.engine.usage = {**USAGE, "prompt_tokens_details": None}
    answers = [server.answer(**fields) for fields in ({}, HOUR)]
    assert answers[0].json()["usage"] == answers[1].json()["usage"]
    assert "cache_creation" not in server.answer(stream=True, **HOUR).text


def test_an_error_stays_as_it_is(server: Server) -> None:
    server.engine.fails = True
    assert server.answer(**HOUR).status_code == 400
    assert server.answer(**HOUR).json() == server.answer().json()
    assert with_cache_creation(None, "answer") == "answer"


def test_a_stream_that_is_left_closes_vllms_own(server: Server) -> None:
    closed = []

    async def stream() -> AsyncGenerator[str, None]:
        try:
            yield "event: ping\ndata: {}\n\n"
            yield "event: ping\ndata: {}\n\n"
        finally:
            closed.append(True)

    async def leave() -> None:
        raw_request = SimpleNamespace(_json=HOUR, state=SimpleNamespace())
        ours = with_cache_creation(raw_request, stream())
        await anext(ours)
        await ours.aclose()

    asyncio.run(leave())
    assert closed == [True]


def test_a_body_is_looked_through_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[Any] = []
    stock = sent_body.retention_wish
    monkeypatch.setattr(
        sent_body, "retention_wish", lambda *given: looked_at.append(given) or stock(*given)
    )
    assert server.answer(**HOUR).json()["usage"] == COUNTS | split(0, 20)
    assert len(looked_at) == 1
