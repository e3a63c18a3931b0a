# SPDX-License-Identifier: Apache-2.0
"""The vendors' own clients ask a real server why less was reused, and read what it answers."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from live_server import LiveServer
from local_models import ROOT, SMOLLM2

pytestmark = pytest.mark.e2e

SYSTEM = "You are a careful assistant who answers in plain words and in one sentence. " * 4
TOOL = {"description": "Tells the weather.", "properties": {"city": {"type": "string"}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    if not (SMOLLM2 / "config.json").exists():
        pytest.skip("smollm2-135m is not built: run `make model`")
    log = tmp_path_factory.mktemp("server") / "server.log"
    template = ROOT / "benchmarks" / "models" / "smollm2_tools.jinja"
    options = ["--plugin", "stateful", "--served-model-name", "smollm2", "smollm2-too"]
    options += ["--max-model-len", "2048", "--block-size", "32", "--chat-template", str(template)]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    store = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    with LiveServer(SMOLLM2, log, *options, environment=store) as live:
        yield live
        assert live.process.poll() is None, live.last_words()


# ---- Anthropic ---------------------------------------------------------------------------


def tool(name: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": TOOL["properties"]}
    return {"name": name, "description": TOOL["description"], "input_schema": schema}


class Messages:
    """A client of Anthropic, and the conversation that it has."""

    def __init__(self, server: LiveServer, *, is_streamed: bool, api_key: str = "one") -> None:
        self.client = anthropic.Anthropic(base_url=server.url, api_key=api_key, max_retries=0)
        self.is_streamed = is_streamed
        self.topic = uuid.uuid4().hex
        self.body: dict[str, Any] = {
            "model": "smollm2",
            "max_tokens": 8,
            "system": f"Topic {self.topic}. {SYSTEM}",
            "tools": [tool("weather"), tool("time")],
            "messages": [{"role": "user", "content": "What is the capital of Spain?"}],
        }

    def ask(self, previous: str | None = None, **changes: Any) -> Any:
        """A message, made by the client of the whole answer."""
        body = {**self.body, "diagnostics": {"previous_message_id": previous}, **changes}
        if not self.is_streamed:
            return self.client.messages.create(**body)
        with self.client.messages.stream(**body) as stream:
            return stream.get_final_message()

    def goes_on(self, answer: Any) -> list[Any]:
        said = "".join(block.text for block in answer.content if block.type == "text") or "-"
        more = [{"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
        return [*self.body["messages"], *more]


def prompt_tokens(message: Any) -> int:
    """Of a message that was not streamed, or of one whose stream is over."""
    usage = message.usage
    parts = (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens)
    return sum(part or 0 for part in parts)


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def is_streamed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def messages(server: LiveServer, is_streamed: bool) -> Messages:
    return Messages(server, is_streamed=is_streamed)


def test_messages_that_only_grow_have_no_diagnosis(messages: Messages) -> None:
    first = messages.ask()
    assert first.diagnostics is None
    second = messages.ask(first.id, messages=messages.goes_on(first))
    assert second.diagnostics is None


EDITED = [{"role": "user", "content": "What is the capital of France?"}]
CHANGES = [
    ("model_changed", {"model": "smollm2-too"}),
    ("system_changed", {"system": "Another one."}),
    ("tools_changed", {"tools": [tool("time"), tool("weather")]}),
    ("messages_changed", {"messages": EDITED}),
    ("unavailable", {"tool_choice": {"type": "none"}}),
]


@pytest.mark.parametrize(("reason", "change"), CHANGES, ids=[reason for reason, _ in CHANGES])
def test_messages_are_told_what_changed(
    messages: Messages, reason: str, change: dict[str, Any]
) -> None:
    first = messages.ask()
    found = messages.ask(first.id, **change).diagnostics.cache_miss_reason
    assert found.type == reason
    if reason == "unavailable":
        assert type(found) is anthropic.types.CacheMissUnavailable
        assert "cache_missed_input_tokens" not in found.model_dump()
    elif reason == "messages_changed":
        assert 0 < found.cache_missed_input_tokens < prompt_tokens(first)
    else:
        assert found.cache_missed_input_tokens == prompt_tokens(first)


def test_messages_are_told_the_first_change_only(messages: Messages) -> None:
    first = messages.ask()
    all_changes = {name: value for _, change in CHANGES for name, value in change.items()}
    found = messages.ask(first.id, **all_changes).diagnostics.cache_miss_reason
    assert found.type == "model_changed"


def test_messages_that_nobody_remembers_are_not_found(messages: Messages) -> None:
    found = messages.ask("msg_unknown").diagnostics.cache_miss_reason
    assert found.type == "previous_message_not_found"
    unasked = messages.client.messages.create(**messages.body)
    assert "diagnostics" not in unasked.model_dump(exclude_unset=True)
    found = messages.ask(unasked.id).diagnostics.cache_miss_reason
    assert found.type == "previous_message_not_found"


def test_messages_of_another_tenant_are_not_found(
    server: LiveServer, messages: Messages, is_streamed: bool
) -> None:
    secret = f"The word is {uuid.uuid4().hex}"
    mine = messages.ask(system=secret)
    other = Messages(server, is_streamed=is_streamed, api_key="two")
    theirs = other.ask(mine.id)
    assert theirs.diagnostics.cache_miss_reason.type == "previous_message_not_found"
    assert secret.split()[-1] not in theirs.model_dump_json()
    assert messages.ask(mine.id, system=secret).diagnostics is None


@pytest.mark.parametrize(
    "sent", ["text", 7, [], {"previous_message_id": 7}, {"previous_message_id": "x" * 999}]
)
def test_messages_with_diagnostics_that_cannot_be_read_are_served(
    server: LiveServer, messages: Messages, sent: Any
) -> None:
    before = server.metric("vllm_stateful_cache_diagnostics_total", result="malformed")
    answer = post(server, "/v1/messages", {**messages.body, "diagnostics": sent})
    assert answer.json()["diagnostics"] == {"cache_miss_reason": {"type": "unavailable"}}
    after = server.metric("vllm_stateful_cache_diagnostics_total", result="malformed")
    assert after == before + 1


def test_null_stands_in_the_answer_only_where_it_was_asked_for(
    messages: Messages, server: LiveServer
) -> None:
    for sent, is_there in (({}, True), ({"previous_message_id": None}, True), (None, False)):
        answer = post(server, "/v1/messages", {**messages.body, "diagnostics": sent}).json()
        assert ("diagnostics" in answer) is is_there
        assert answer.get("diagnostics") is None


def test_a_stream_says_it_in_message_start_only(server: LiveServer, messages: Messages) -> None:
    asked = {"diagnostics": {"previous_message_id": "msg_unknown"}, "stream": True}
    events = events_of(post(server, "/v1/messages", {**messages.body, **asked}).text)
    with_it = [event for event in events if "diagnostics" in json.dumps(event)]
    assert [event["type"] for event in with_it] == ["message_start"]
    expected = {"cache_miss_reason": {"type": "previous_message_not_found"}}
    assert with_it[0]["message"]["diagnostics"] == expected


def post(
    server: LiveServer, path: str, body: dict[str, Any], api_key: str = "one"
) -> httpx.Response:
    headers = {"Authorization": f"Bearer {api_key}"}
    answer = httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer


def events_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]
