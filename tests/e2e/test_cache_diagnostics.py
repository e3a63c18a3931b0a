# SPDX-License-Identifier: Apache-2.0
"""The vendors' own clients ask a real server why less was reused, and read what it answers."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import anthropic
import httpx
import openai
import pytest
from live_server import LiveServer
from local_models import ROOT, TINY

pytestmark = pytest.mark.e2e

ENDS = ("response.completed", "response.incomplete")
"""vLLM 0.33 calls a response incomplete that has reached its ``max_output_tokens``."""

REFUSES = tuple(map(int, version("vllm").split(".")[:2])) >= (0, 33)
"""Whether vLLM's own model of a Responses request has ``prompt_cache_options``."""

SYSTEM = "You are a careful assistant who answers in plain words and in one sentence. " * 4
TOOL = {"description": "Tells the weather.", "properties": {"city": {"type": "string"}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    if not (TINY / "config.json").exists():
        pytest.skip("tiny-llama is not built: run `make model`")
    log = tmp_path_factory.mktemp("server") / "server.log"
    template = ROOT / "benchmarks" / "models" / "smollm2_tools.jinja"
    options = ["--plugin", "stateful", "--served-model-name", "tiny", "tiny-too"]
    options += ["--max-model-len", "2048", "--block-size", "32", "--chat-template", str(template)]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    store = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    with LiveServer(TINY, log, *options, environment=store) as live:
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
            "model": "tiny",
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
    ("model_changed", {"model": "tiny-too"}),
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
    server: LiveServer, path: str, body: dict[str, Any], api_key: str = "one", status: int = 200
) -> httpx.Response:
    headers = {"Authorization": f"Bearer {api_key}"}
    answer = httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=120)
    assert answer.status_code == status, answer.text
    return answer


def events_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


# ---- OpenAI ------------------------------------------------------------------------------


class OpenAI:
    """A client of OpenAI, and the conversation that it has through one of its two APIs."""

    def __init__(
        self, server: LiveServer, api: str, *, is_streamed: bool, api_key: str = "one"
    ) -> None:
        self.client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=api_key, max_retries=0)
        self.is_responses = api == "responses"
        self.path = "/v1/responses" if self.is_responses else "/v1/chat/completions"
        self.is_streamed = is_streamed
        self.secret = uuid.uuid4().hex
        self.body: dict[str, Any] = {"model": "tiny", "temperature": 0}
        self.body |= self.conversation(f"Topic {self.secret}. {SYSTEM}")
        self.body |= {"tools": [self.tool("weather"), self.tool("time")]}
        self.body |= {"max_output_tokens" if self.is_responses else "max_tokens": 8}

    def conversation(self, system: str, *said: str) -> dict[str, Any]:
        """System prompt and questions, each of them answered."""
        turns = [{"role": "user", "content": said[0] if said else "What is the capital of Spain?"}]
        for question in said[1:]:
            turns.append({"role": "assistant", "content": "Hm."})
            turns.append({"role": "user", "content": question})
        if self.is_responses:
            return {"instructions": system, "input": turns}
        return {"messages": [{"role": "system", "content": system}, *turns]}

    def tool(self, name: str) -> dict[str, Any]:
        parameters = {"type": "object", "properties": TOOL["properties"]}
        function = {"name": name, "description": TOOL["description"], "parameters": parameters}
        nested = {"type": "function", "function": function}
        return {"type": "function", **function} if self.is_responses else nested

    def ask(self, compared: str | None = None, **changes: Any) -> Any:
        """The final object, or the last chunk of a chat stream that says anything of the cache."""
        body = {**self.body, "prompt_cache_options": {"comparison_response_id": compared}}
        body |= changes
        if self.is_responses:
            made: Any = self.client.responses.create(**body, stream=self.is_streamed)
            if not self.is_streamed:
                return made
            events = list(made)
            assert events[-1].type in ENDS
            return events[-1].response
        if not self.is_streamed:
            return self.client.chat.completions.create(**body)
        chunks = list(self.client.chat.completions.create(**body, stream=True))
        with_it = [
            each for each in chunks if "prompt_cache_diagnostics" in (each.model_extra or {})
        ]
        assert len(with_it) == (compared is not None)
        return with_it[0] if with_it else chunks[-1]


def told(answer: Any) -> dict[str, Any] | None:
    """``prompt_cache_diagnostics``, which is no field of a chat completion."""
    found = answer.model_dump().get("prompt_cache_diagnostics")
    assert found is None or isinstance(found, dict)
    if isinstance(answer, openai.types.responses.Response) and found is not None:
        assert type(answer.prompt_cache_diagnostics).__name__.startswith("PromptCacheDiagnostics")
    return found


@pytest.fixture(params=["responses", "chat"])
def openai_client(server: LiveServer, request: pytest.FixtureRequest, is_streamed: bool) -> OpenAI:
    return OpenAI(server, request.param, is_streamed=is_streamed)


def test_an_openai_conversation_that_only_grows_is_a_hit(openai_client: OpenAI) -> None:
    first = openai_client.ask()
    assert told(first) is None
    system = f"Topic {openai_client.secret}. {SYSTEM}"
    more = openai_client.conversation(system, "What is the capital of Spain?", "And then?")
    assert told(openai_client.ask(first.id, **more)) == {"type": "cache_hit"}


OTHER = "Another one, which is not at all what it was before, so that nothing of it is reused."
OPENAI_CHANGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("model_changed", {"model": "tiny-too"}, {}),
    ("prompt_cache_key_changed", {"prompt_cache_key": "other"}, {}),
    ("service_tier_changed", {"service_tier": "flex"}, {}),
    ("tools_changed", {}, {}),
    (
        "text_format_changed",
        {"text": {"format": {"type": "json_object"}}},
        {"response_format": {"type": "json_object"}},
    ),
    (
        "reasoning_effort_changed",
        {"reasoning": {"effort": "low"}},
        {"reasoning_effort": "low"},
    ),
    ("verbosity_changed", {"text": {"verbosity": "low"}}, {"verbosity": "low"}),
    ("input_changed", {}, {}),
]


@pytest.mark.parametrize(
    ("reason", "change", "in_chat"), OPENAI_CHANGES, ids=[each[0] for each in OPENAI_CHANGES]
)
def test_an_openai_client_is_told_what_changed(
    openai_client: OpenAI, reason: str, change: dict[str, Any], in_chat: dict[str, Any]
) -> None:
    """Beside a setting the input changes, too: else vLLM reuses the prompt, and it is a hit."""
    first = openai_client.ask()
    changes = (change if openai_client.is_responses else in_chat) or change
    if reason == "tools_changed":
        changes = {"tools": openai_client.body["tools"][::-1]}
    other = openai_client.conversation(OTHER)
    found = told(openai_client.ask(first.id, **{**changes, **other}))
    assert found is not None
    assert (found["type"], found["reason"]) == ("cache_miss", reason)
    assert found["cache_missed_tokens"] > 0
    if openai_client.is_responses or not openai_client.is_streamed:
        total = (
            first.usage.input_tokens if openai_client.is_responses else first.usage.prompt_tokens
        )
        assert found["comparison_reusable_tokens"] == total
        assert found["cache_missed_tokens"] <= total


def test_a_setting_that_costs_nothing_here_is_a_hit(openai_client: OpenAI) -> None:
    if openai_client.is_streamed and not openai_client.is_responses:
        pytest.skip("a chat stream does not count without stream_options")
    first = openai_client.ask()
    changed = {"service_tier": "flex"}
    assert told(openai_client.ask(first.id, **changed)) == {"type": "cache_hit"}


def test_an_openai_response_that_nobody_remembers_is_not_found(openai_client: OpenAI) -> None:
    assert told(openai_client.ask("resp_unknown")) == {"type": "comparison_response_not_found"}


def test_an_openai_response_of_another_tenant_is_not_found(
    server: LiveServer, openai_client: OpenAI, is_streamed: bool
) -> None:
    mine = openai_client.ask()
    api = "responses" if openai_client.is_responses else "chat"
    other = OpenAI(server, api, is_streamed=is_streamed, api_key="two")
    theirs = other.ask(mine.id)
    assert told(theirs) == {"type": "comparison_response_not_found"}
    assert openai_client.secret not in theirs.model_dump_json()
    assert told(openai_client.ask(mine.id)) == {"type": "cache_hit"}


def test_any_response_can_be_compared_with(server: LiveServer) -> None:
    """As in OpenAI's own example: the first request says nothing of diagnostics."""
    client = OpenAI(server, "responses", is_streamed=False)
    first = client.client.responses.create(**client.body)
    assert "prompt_cache_diagnostics" not in first.model_dump(exclude_unset=True)
    more = {"previous_response_id": first.id, "input": "And then?"}
    assert told(client.ask(first.id, **more)) == {"type": "cache_hit"}
    found = told(client.ask(first.id, **more, instructions=OTHER))
    assert found is not None
    assert found["reason"] == "input_changed"
    chained = client.client.responses.create(**{**client.body, **more})
    further = {"previous_response_id": chained.id, "input": "And then?"}
    assert told(client.ask(first.id, **further)) == {"type": "cache_hit"}


def test_the_usage_of_a_chat_stream_comes_with_the_diagnosis(server: LiveServer) -> None:
    client = OpenAI(server, "chat", is_streamed=True)
    usage = {"stream_options": {"include_usage": True}}
    first = client.ask(None, **usage)
    found = client.ask(first.id, **usage, **client.conversation(OTHER))
    assert not found.choices
    assert told(found)["comparison_reusable_tokens"] == first.usage.prompt_tokens  # type: ignore[index]


@pytest.mark.parametrize("compared", [7, [], "x" * 999])
def test_an_id_that_cannot_be_read_is_served(
    server: LiveServer, openai_client: OpenAI, compared: Any
) -> None:
    """But where vLLM reads the field itself, and refuses what has another type."""
    is_refused = REFUSES and openai_client.is_responses
    asked = {"prompt_cache_options": {"comparison_response_id": compared}}
    status = 400 if is_refused and not isinstance(compared, str) else 200
    body = {**openai_client.body, **asked}
    answer = post(server, openai_client.path, body, status=status).json()
    assert status == 400 or answer["prompt_cache_diagnostics"] == {"type": "unavailable"}
    for options in (None, "text", {}, {"comparison_response_id": None}):
        status = 400 if is_refused and options == "text" else 200
        body = {**openai_client.body, "prompt_cache_options": options}
        answer = post(server, openai_client.path, body, status=status).json()
        assert "prompt_cache_diagnostics" not in answer


def test_breakpoints_and_options_are_accepted(openai_client: OpenAI) -> None:
    mark = {"prompt_cache_breakpoint": {"mode": "explicit", "ttl": "12h"}}
    kind = "input_text" if openai_client.is_responses else "text"
    block = {"type": kind, "text": "What is the capital of Spain?", **mark}
    first = openai_client.ask()
    body = openai_client.conversation(f"Topic {openai_client.secret}. {SYSTEM}")
    turns = body["input"] if openai_client.is_responses else body["messages"]
    turns[-1] = {"role": "user", "content": [block]}
    options = {"comparison_response_id": first.id, "mode": "explicit", "ttl": "30m"}
    assert told(openai_client.ask(first.id, prompt_cache_options=options, **body)) == {
        "type": "cache_hit"
    }


@pytest.mark.parametrize("api", ["responses", "chat"])
def test_a_prompt_is_prepared_for_the_request_that_follows(server: LiveServer, api: str) -> None:
    client = OpenAI(server, api, is_streamed=False)
    prepared = client.ask(prompt_cache_options={"prewarm": True}).usage.model_dump()
    assert prepared["output_tokens" if client.is_responses else "completion_tokens"] == 1
    usage = client.ask().usage.model_dump()
    prompt = "input_tokens" if client.is_responses else "prompt_tokens"
    assert usage[f"{prompt}_details"]["cached_tokens"] == usage[prompt] - 1


def test_whoever_does_not_ask_gets_the_bytes_of_vllm(
    server: LiveServer, openai_client: OpenAI
) -> None:
    """But for ids and times, which are others at each request."""
    asked = {"prompt_cache_options": {"comparison_response_id": "resp_unknown"}}
    stream = {"stream": openai_client.is_streamed}
    stock = post(server, openai_client.path, {**openai_client.body, **stream})
    told_too = post(server, openai_client.path, {**openai_client.body, **stream, **asked})
    for answer in (stock, told_too):
        if not openai_client.is_streamed:
            assert int(answer.headers["content-length"]) == len(answer.content)
    assert "prompt_cache_diagnostics" not in stock.text
    field = '"prompt_cache_diagnostics":{"type":"comparison_response_not_found"}'
    assert told_too.text.count(field) == 1
    if openai_client.is_streamed:  # in how many events a text comes depends on the reader
        ends = [events_of(answer.text)[-1] for answer in (stock, told_too)]
        answers = [end.get("response", end) for end in ends]
        del answers[1]["prompt_cache_diagnostics"]
        assert answers[0].keys() == answers[1].keys()
