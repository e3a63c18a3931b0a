# SPDX-License-Identifier: Apache-2.0
"""The header that says which conversation an answer belongs to."""

from __future__ import annotations

import asyncio
import base64
import os
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_stateful.adapters.frontend import identity, session_header
from vllm_stateful.adapters.frontend.identity import identify
from vllm_stateful.adapters.frontend.session_header import SessionHeader
from vllm_stateful.request import ResponseChain, conversation_id, tenant_of

SESSION = "0d3a9c52-6f1e-4b7a-8a55-2f6d0c9e7b11"
ALICE = {"authorization": "Bearer key-of-alice"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Why?"}]}
COOKIE = {"x-session-id": base64.b64encode(b"10.0.0.1:8000").decode()}
START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"x")]}


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("VLLM_STATEFUL")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(identity, "_responses", ResponseChain())
    monkeypatch.setattr(session_header, "_made", ResponseChain())


class Answer:
    """The answer to one request, as it leaves the server."""

    def __init__(
        self,
        headers: dict[str, str],
        sent: dict[str, Any] | None,
        path: str = "/v1/chat/completions",
        stock: list[tuple[bytes, bytes]] | None = None,
        **fields: Any,
    ) -> None:
        raw = [(name.encode("latin-1"), text.encode("latin-1")) for name, text in headers.items()]
        state: dict[str, Any] = {}
        self.scope = {"type": "http", "method": "POST", "path": path, "headers": raw}
        self.scope["state"] = state
        self.passed: list[Any] = []
        start = START if stock is None else {**START, "headers": stock}
        request = SimpleNamespace(**{**(sent or {}), **fields})
        http = SimpleNamespace(headers=headers, state=SimpleNamespace(), _json=sent)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if sent is not None:
                identify(request, http, None)
                state.update(vars(http.state))
            await send(start)
            await send({"type": "http.response.body", "body": b"data"})

        async def send(message: Any) -> None:
            self.passed.append(message)

        made = SessionHeader(app, identity.keeps_sessions, identity.tenant_isolation)
        asyncio.run(made(self.scope, None, send))
        self.headers = self.passed[0]["headers"]
        assert self.passed[1] == {"type": "http.response.body", "body": b"data"}

    @property
    def session_id(self) -> str | None:
        found = [text for name, text in self.headers if name == b"x-session-id"]
        assert len(found) <= 1
        return found[0].decode() if found else None


@pytest.mark.parametrize(
    ("headers", "fields", "expected"),
    [
        ({"x-session-id": SESSION}, {}, SESSION),
        ({}, {"session_id": SESSION}, SESSION),
        ({}, {"vllm_xargs": {"session_id": SESSION}}, SESSION),
        ({"thread-id": SESSION}, {}, SESSION),
        ({"x-claude-code-session-id": SESSION}, {}, SESSION),
        (
            {"x-claude-code-session-id": SESSION, "x-claude-code-agent-id": "one"},
            {},
            f"{SESSION}/one",
        ),
        ({}, {"prompt_cache_key": "claude-code:of-mine"}, "claude-code:of-mine"),
        ({}, {"metadata": {"user_id": f"user_a_account__session_{SESSION}"}}, SESSION),
    ],
)
def test_an_answer_has_the_id_that_the_client_sent(
    headers: dict[str, str], fields: dict[str, Any], expected: str
) -> None:
    assert Answer(headers, {**CHAT, **fields}).session_id == expected


def test_what_cannot_stand_in_a_header_is_replaced() -> None:
    shown = [
        Answer({}, {**CHAT, "session_id": name}).session_id for name in ("сессия-1", " spaces ")
    ]
    assert all(text is not None and text.startswith("c-") for text in shown)
    assert len(set(shown)) == 2
    assert Answer(ALICE, {**CHAT, "session_id": "сессия-1"}).session_id not in shown


@pytest.mark.parametrize("headers", [{}, ALICE, {"x-session-id": "default"}])
def test_a_conversation_without_a_name_has_an_id_of_its_own(headers: dict[str, str]) -> None:
    first = Answer(headers, CHAT).session_id
    assert first == conversation_id(CHAT, tenant_of(headers))
    more = [*CHAT["messages"], {"role": "assistant", "content": "So."}]
    assert Answer(headers, {**CHAT, "messages": more}).session_id == first
    named = Answer({**headers, "x-session-id": str(first)}, {**CHAT, "messages": more})
    assert named.session_id == first


def test_a_chain_of_responses_keeps_the_id_of_its_first() -> None:
    path = "/v1/responses"

    def turn(number: int, text: str, previous: str | None = None, **headers: str) -> str | None:
        fields = {"model": "m", "input": text, "store": True, "previous_response_id": previous}
        request_id = f"resp_{number}"
        return Answer(headers or ALICE, fields, path, request_id=request_id).session_id

    first = turn(1, "Why?")
    assert first == conversation_id({"model": "m", "input": "Why?"}, tenant_of(ALICE))
    assert turn(2, "And?", "resp_1") == first
    assert turn(3, "So?", "resp_2") == first
    other = turn(4, "So?", "resp_2", authorization="Bearer key-of-bob")
    assert other not in (first, None)
    assert turn(5, "Why?", **ALICE, **{"x-session-id": SESSION}) == SESSION
    later = turn(6, "And?", "resp_5")
    assert later not in (first, None, SESSION), "this turn's client has not sent the id"
    assert turn(7, "So?", "resp_6") == later


def test_a_failed_request_has_the_id_of_its_headers() -> None:
    assert Answer({"x-session-id": SESSION}, None).session_id == SESSION
    assert Answer({"thread-id": SESSION}, None, "/base/v1/messages").session_id == SESSION
    assert Answer({"x-session-id": "default"}, None).headers == START["headers"]
    assert Answer({"x-session-id": SESSION}, None, "/v1/models").headers == START["headers"]


def test_a_gateways_cookie_is_left_to_the_gateway() -> None:
    for headers in (COOKIE, {**COOKIE, "thread-id": SESSION}):
        assert Answer(headers, CHAT).headers == START["headers"]
        assert Answer(headers, None).headers == START["headers"]


def test_a_header_that_is_there_stays() -> None:
    stock = [(b"X-Session-ID", b"of-another-layer")]
    assert Answer({}, CHAT, stock=stock).headers == stock


def test_a_browser_may_read_it() -> None:
    expose = (b"access-control-expose-headers", b"X-Session-ID")
    assert expose in Answer({"origin": "http://here"}, CHAT).headers
    assert expose not in Answer({}, CHAT).headers


def test_several_conversations_in_one_request_have_no_id() -> None:
    answer = Answer({}, {**CHAT, "messages": [CHAT["messages"], CHAT["messages"]]})
    assert answer.headers == START["headers"]


def test_where_the_plugin_stands_aside_nothing_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_engine_off", "an unsupported model")
    for sent in (CHAT, None):
        answer = Answer({"x-session-id": SESSION}, sent)
        assert answer.passed[0] == START
        assert not [name for name in answer.scope["state"] if "header" in name]


def test_what_is_no_http_request_passes() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))

    scope = {"type": "lifespan"}
    made = SessionHeader(app, lambda: True, lambda: True)
    asyncio.run(made(scope, "receive", "send"))
    assert seen == [(scope, "receive", "send")]
