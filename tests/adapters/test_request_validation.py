# SPDX-License-Identifier: Apache-2.0
"""Chat requests through vLLM's own route: validated by shape, the same request or error."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.entrypoints.openai.chat_completion.api_router import router
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from vllm_stateful.adapters.frontend import request_validation as adapter
from vllm_stateful.config import process_config
from vllm_stateful.observe.prompt_counts import PromptCounts

CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PLAIN: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "done"},
] * 10


class Chat:
    """Stands where vLLM's handler does, and keeps the request that it is given."""

    def __init__(self) -> None:
        self.seen: list[ChatCompletionRequest] = []

    async def create_chat_completion(self, request: ChatCompletionRequest, _: Request) -> Any:
        self.seen.append(request)
        raise NotImplementedError


def make_app(*, ours: bool) -> tuple[TestClient, Chat]:
    app, chat = FastAPI(), Chat()
    app.include_router(router)
    app.state.openai_serving_chat = chat
    app.state.enable_server_load_tracking = False
    if ours:
        assert adapter.validate_plain_messages(app)
    return TestClient(app, raise_server_exceptions=False), chat


STOCK, OURS = make_app(ours=False), make_app(ours=True)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[PromptCounts]:
    monkeypatch.setenv("VLLM_STATEFUL_VERIFY_TOKENS", "0")
    fresh = PromptCounts()
    monkeypatch.setattr(adapter, "PROMPT_COUNTS", fresh)
    return fresh


def validated(counts: PromptCounts) -> dict[str, int]:
    return dict(counts.snapshot()["chats_validated"])


def both(body: Any) -> ChatCompletionRequest | None:
    """Ask both; the same request reaches the handler, or the client reads the same error."""
    text = body if isinstance(body, str) else json.dumps(body)
    found = []
    for client, chat in (STOCK, OURS):
        chat.seen.clear()
        headers = {"content-type": "application/json"}
        reply = client.post("/v1/chat/completions", content=text, headers=headers)
        found.append((reply.status_code, reply.text, [dump(seen) for seen in chat.seen]))
    assert found[0] == found[1]
    return OURS[1].seen[0] if OURS[1].seen else None


def dump(request: ChatCompletionRequest) -> str:
    """With the order of the keys."""
    others = request.model_dump(exclude={"messages", "request_id"})
    return json.dumps([request.messages, others], default=list)


def test_plain_messages_are_validated_by_their_shape(counts: PromptCounts) -> None:
    assert both({"model": "m", "messages": PLAIN}) is not None
    assert validated(counts) == {"shape": 1, "full": 0}


def test_few_messages_are_left_to_vllm(counts: PromptCounts) -> None:
    assert both({"model": "m", "messages": PLAIN[:3]}) is not None
    assert validated(counts) == {"shape": 0, "full": 0}


def test_others_between_them_keep_their_places(counts: PromptCounts) -> None:
    odd = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    thought = {"role": "assistant", "content": "x", "reasoning_content": "because"}
    messages = [odd, *PLAIN[:9], thought, *PLAIN[9:], odd]
    request = both({"model": "m", "messages": messages, "temperature": 0})
    assert request is not None
    assert request.messages[10]["reasoning"] == "because"  # type: ignore[typeddict-item]
    assert validated(counts) == {"shape": 1, "full": 0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": [*PLAIN, {"content": "no role"}]},
        {"messages": [*PLAIN, 7]},
        {"messages": PLAIN, "temperature": "hot"},
        {"messages": PLAIN, "tool_choice": "required"},
        {"messages": PLAIN, "n": "x", "stream_options": {"include_usage": True}},
        {"messages": PLAIN, "add_generation_prompt": True, "continue_final_message": True},
    ],
)
def test_errors_are_those_of_vllm(counts: PromptCounts, wrong: dict[str, Any]) -> None:
    assert both({"model": "m", **wrong}) is None
    assert validated(counts) == {"shape": 0, "full": 1}


@pytest.mark.parametrize("body", ["[]", "7", "null", '{"messages": 7}', "{", '{"model": "m"}'])
def test_what_is_no_chat_request(counts: PromptCounts, body: str) -> None:
    assert both(body) is None
    assert validated(counts) == {"shape": 0, "full": 0}


TEXT = st.text(max_size=6) | st.sampled_from(["", "\ud800", "\x00", "user"])
ANY = st.none() | st.booleans() | st.integers(0, 3) | TEXT | st.just([]) | st.just({})
FUNCTION = st.fixed_dictionaries({}, optional={"name": TEXT, "arguments": TEXT, "x": ANY})
TOOL_CALL = st.fixed_dictionaries(
    {"id": TEXT, "function": FUNCTION | ANY}, optional={"type": st.just("function"), "x": ANY}
)
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}), max_size=2)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", "developer", "x"])},
    optional={
        "content": TEXT | TEXT | PARTS | ANY,
        "tool_calls": st.lists(TOOL_CALL | st.just(CALL), max_size=2) | ANY,
        "tool_call_id": TEXT | ANY,
        "name": TEXT | ANY,
        "reasoning": TEXT | ANY,
        "reasoning_content": TEXT,
    },
).flatmap(lambda message: st.permutations(list(message.items())).map(dict))


@settings(max_examples=300, deadline=None)
@given(messages=st.lists(MESSAGE, min_size=1, max_size=4), place=st.integers(0, 30))
def test_any_messages(messages: list[dict[str, Any]], place: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_STATEFUL_VERIFY_TOKENS", "0")
        both({"model": "m", "messages": [*PLAIN[:place], *messages, *PLAIN[place:]]})


def test_a_share_is_validated_in_full(
    counts: PromptCounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_VERIFY_TOKENS", "1")
    assert both({"model": "m", "messages": PLAIN}) is not None
    assert validated(counts) == {"shape": 0, "full": 1}


@pytest.mark.parametrize("content", [[], [{"type": "text"}], [{"type": "text", "text": "t"}]])
def test_what_vllm_reads_only_when_it_is_asked_for_is_no_difference(
    counts: PromptCounts, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    client, chat = make_app(ours=True)
    monkeypatch.setenv("VLLM_STATEFUL_VERIFY_TOKENS", "1")
    odd = {"role": "user", "content": content}
    client.post("/v1/chat/completions", json={"model": "m", "messages": [*PLAIN, odd]})
    monkeypatch.setenv("VLLM_STATEFUL_VERIFY_TOKENS", "0")
    process_config.cache_clear()
    client.post("/v1/chat/completions", json={"model": "m", "messages": PLAIN})
    assert validated(counts) == {"shape": 1, "full": 1}
    assert len(chat.seen) == 2


def test_one_difference_turns_it_off(
    counts: PromptCounts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client, chat = make_app(ours=True)
    monkeypatch.setenv("VLLM_STATEFUL_VERIFY_TOKENS", "1")
    wrong = adapter.SplitMessages.joined
    monkeypatch.setattr(
        adapter.SplitMessages, "joined", lambda self, others: wrong(self, others)[::-1]
    )
    for _ in range(2):
        client.post("/v1/chat/completions", json={"model": "m", "messages": PLAIN})
    assert [dict(message) for message in chat.seen[0].messages] == PLAIN
    assert chat.seen[0].messages == chat.seen[1].messages
    assert validated(counts) == {"shape": 0, "full": 1}


def test_no_chat_route_or_another_one_is_left_alone() -> None:
    other = FastAPI()
    assert not adapter.validate_plain_messages(other)

    @other.post(adapter.CHAT_PATH)
    async def chat(request: dict[str, Any]) -> None: ...

    assert not adapter.validate_plain_messages(other)


def test_another_validation_than_expected_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter.SplitMessages, "joined", lambda self, others: PLAIN)
    app = FastAPI()
    app.include_router(router)
    assert not adapter.validate_plain_messages(app)


def test_the_loop_runs_between_the_json_and_the_validation() -> None:
    app = FastAPI()
    app.include_router(router)
    adapter.validate_plain_messages(app)
    (route,) = [r for r in app.router.routes if getattr(r, "path", None) == adapter.CHAT_PATH]
    dependencies = [each.call.__name__ for each in route.dependant.dependencies]  # type: ignore[attr-defined]
    assert dependencies == ["validate_json_request", "_let_others_run"]
