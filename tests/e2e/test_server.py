# SPDX-License-Identifier: Apache-2.0
"""`vllm serve MODEL --plugin stateful`, unchanged clients, every way in which a turn can end.

One server for the whole file, with the invariant checked in every step: had any turn left the
block pool inconsistent, the engine would have stopped and all later tests would fail.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from live_server import LiveServer
from local_models import ROOT, SMOLLM2

pytestmark = pytest.mark.e2e

SYSTEM = "You are a careful assistant who answers in plain words and in one sentence. " * 4


class Server:
    """A running `vllm serve` and the ways to talk to it."""

    def __init__(self, live: LiveServer, model: str) -> None:
        self.url = live.url
        self.metric = live.metric
        self.model = model

    def openai(self, api_key: str = "tenant-one") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0)

    def chat(self, messages: list[Any], api_key: str = "tenant-one", **options: Any) -> Any:
        options = {"max_tokens": 12, "temperature": 0, **options}
        client = self.openai(api_key)
        return client.chat.completions.create(model=self.model, messages=messages, **options)

    def two_turns(self, api_key: str = "tenant-one", **options: Any) -> tuple[int, int]:
        """Tokens reused by the second turn of a new conversation, and context before it."""
        messages = conversation(uuid.uuid4().hex)
        first = self.chat(messages, api_key, **options)
        messages += [as_message(first), {"role": "user", "content": "And then?"}]
        second = self.chat(messages, api_key, **options)
        return cached(second), first.usage.total_tokens - 1


def conversation(topic: str) -> list[Any]:
    return [
        {"role": "system", "content": f"Topic {topic}. {SYSTEM}"},
        {"role": "user", "content": "What is the capital of France?"},
    ]


def as_message(response: Any) -> dict[str, str]:
    return {"role": "assistant", "content": response.choices[0].message.content}


def cached(response: Any) -> int:
    return int(response.usage.prompt_tokens_details.cached_tokens or 0)


def new_id() -> dict[str, str]:
    return {"X-Session-ID": f"session-{uuid.uuid4().hex}"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not (SMOLLM2 / "config.json").exists():
        pytest.skip("smollm2-135m is not built: run `make model`")
    log = tmp_path_factory.mktemp("server") / "server.log"
    template = ROOT / "benchmarks" / "models" / "smollm2_tools.jinja"
    options = ["--plugin", "stateful", "--stateful-check-invariants"]
    options += ["--served-model-name", "smollm2", "--max-model-len", "2048", "--block-size", "32"]
    options += ["--scheduling-policy", "priority", "--chat-template", str(template)]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with LiveServer(SMOLLM2, log, *options) as live:
        yield Server(live, "smollm2")
        assert live.process.poll() is None, live.last_words()


def test_a_turn_resumes_at_the_last_computed_token(server: Server) -> None:
    reused, context = server.two_turns(extra_headers=new_id())
    assert reused == context


def test_a_turn_without_any_session_id_resumes_too(server: Server) -> None:
    reused, context = server.two_turns()
    assert reused == context


def test_streaming_reports_usage_and_resumes(server: Server) -> None:
    messages, headers = conversation(uuid.uuid4().hex), new_id()
    first = server.chat(messages, extra_headers=headers)
    messages += [as_message(first), {"role": "user", "content": "And then?"}]
    stream = server.chat(
        messages, extra_headers=headers, stream=True, stream_options={"include_usage": True}
    )
    usage = [chunk.usage for chunk in stream if chunk.usage][-1]
    assert usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens - 1


@pytest.mark.parametrize(
    "headers",
    [
        {"x-claude-code-session-id": "0b7f2c2e-6d0e-4d27-9f2c-30a3f6d8f001"},
        {"session-id": "0b7f2c2e-6d0e-4d27-9f2c-30a3f6d8f002"},
        {"x-opencode-session": "ses_0b7f2c2e6d0e4d279f2c"},
        {"x-dynamo-session-id": "0b7f2c2e-6d0e-4d27-9f2c-30a3f6d8f003"},
    ],
    ids=lambda headers: next(iter(headers)),
)
def test_the_headers_that_agents_send_name_the_session(
    server: Server, headers: dict[str, str]
) -> None:
    reused, context = server.two_turns(extra_headers=headers)
    assert reused == context
    (sent,) = headers.values()
    closed = close(server, sent)
    assert closed.status_code == 200, closed.text
    assert close(server, sent).status_code == 404


def close(server: Server, session_id: str, api_key: str = "tenant-one") -> httpx.Response:
    headers = {"Authorization": f"Bearer {api_key}"}
    return httpx.delete(f"{server.url}/v1/sessions/{session_id}", headers=headers)


def test_anthropic_messages_resume_by_metadata(server: Server) -> None:
    session = "0b7f2c2e-6d0e-4d27-9f2c-30a3f6d8f004"
    user_id = f"user_{'a' * 64}_account__session_{session}"
    client = anthropic.Anthropic(base_url=server.url, api_key="tenant-one", max_retries=0)
    messages: list[Any] = [{"role": "user", "content": "What is the capital of Spain?"}]
    options: dict[str, Any] = {
        "model": "smollm2",
        "max_tokens": 12,
        "system": f"Topic {uuid.uuid4().hex}. {SYSTEM}",
        "metadata": {"user_id": user_id},
        "extra_body": {"temperature": 0},
    }
    first = client.messages.create(messages=messages, **options)
    messages += [
        {"role": "assistant", "content": first.content[0].text},
        {"role": "user", "content": "And then?"},
    ]
    second = client.messages.create(messages=messages, **options)
    assert second.usage.cache_read_input_tokens >= 32
    assert close(server, session).status_code == 200


def test_answers_say_which_conversation_they_belong_to(server: Server) -> None:
    """The client's own id; else one that is the same at each turn, and names the session."""
    messages, named = conversation(uuid.uuid4().hex), new_id()
    raw = server.openai().chat.completions.with_raw_response
    options: dict[str, Any] = {"model": server.model, "max_tokens": 12, "temperature": 0}
    own = raw.create(messages=messages, extra_headers=named, stream=True, **options)
    assert own.headers["x-session-id"] == named["X-Session-ID"]
    assert len(list(own.parse())) > 0

    messages = conversation(uuid.uuid4().hex)
    first = raw.create(messages=messages, **options)
    made, context = first.headers["x-session-id"], first.parse().usage.total_tokens - 1
    messages += [as_message(first.parse()), {"role": "user", "content": "And then?"}]
    stuck = raw.create(messages=messages, extra_headers={"X-Session-ID": made}, **options)
    assert made == stuck.headers["x-session-id"]
    assert cached(stuck.parse()) == context
    assert close(server, made).status_code == 200

    client = anthropic.Anthropic(base_url=server.url, api_key="tenant-one", max_retries=0)
    other: dict[str, Any] = {"model": server.model, "max_tokens": 4, "system": uuid.uuid4().hex}
    ids = set()
    for asked in (["Why?"], ["Why?", "So.", "And?"]):
        roles = ("user", "assistant", "user")[: len(asked)]
        pairs = zip(roles, asked, strict=True)
        history: Any = [{"role": role, "content": text} for role, text in pairs]
        answer = client.messages.with_raw_response.create(messages=history, **other)
        ids.add(answer.headers["x-session-id"])
    assert len(ids) == 1
    assert made not in ids

    failed = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": 7}, headers=named)
    assert (failed.status_code, failed.headers["x-session-id"]) == (400, named["X-Session-ID"])


def test_an_anthropic_client_that_asks_for_an_hour_is_told_what_was_written(
    server: Server,
) -> None:
    client = anthropic.Anthropic(base_url=server.url, api_key="tenant-one", max_retries=0)
    hour = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    topic = {"type": "text", "text": f"Topic {uuid.uuid4().hex}. {SYSTEM}"}
    messages: list[Any] = [{"role": "user", "content": "What is the capital of Spain?"}]
    options: dict[str, Any] = {"model": "smollm2", "system": [{**topic, **hour}]}
    more = {"max_tokens": 12, "extra_body": {"temperature": 0}}

    def check(usage: Any, written_1h: int, written_5m: int) -> None:
        prompt = client.messages.count_tokens(messages=messages, **options).input_tokens
        written = usage.cache_creation_input_tokens
        assert usage.input_tokens + usage.cache_read_input_tokens + written == prompt
        assert usage.input_tokens == 0, "the session keeps the partly filled last block too"
        assert written_1h == written > 0 == written_5m

    first = client.messages.create(messages=messages, **options, **more)
    split = first.usage.cache_creation
    assert first.usage.cache_read_input_tokens == 0
    check(first.usage, split.ephemeral_1h_input_tokens, split.ephemeral_5m_input_tokens)

    messages += [{"role": "assistant", "content": first.content[0].text}]
    messages += [{"role": "user", "content": [{"type": "text", "text": f"Why? {SYSTEM}"}]}]
    for event in client.messages.create(messages=messages, **options, **more, stream=True):
        if event.type == "message_start":
            assert event.message.usage.cache_creation is None
        elif event.type == "message_delta":
            second = event.usage
    tokens = first.usage.input_tokens + first.usage.cache_creation_input_tokens
    assert second.cache_read_input_tokens == tokens + first.usage.output_tokens - 1
    split = second.cache_creation
    check(second, split["ephemeral_1h_input_tokens"], split["ephemeral_5m_input_tokens"])

    options["system"] = [topic]
    third = client.messages.create(messages=messages, **options, **more)
    assert third.usage.cache_creation is None
    assert third.usage.cache_read_input_tokens > second.cache_read_input_tokens


def test_two_tenants_with_one_session_id_share_nothing(server: Server) -> None:
    messages, headers = conversation(uuid.uuid4().hex), new_id()
    assert cached(server.chat(messages, "tenant-one", extra_headers=headers)) == 0
    assert cached(server.chat(messages, "tenant-two", extra_headers=headers)) == 0
    assert cached(server.chat(messages, "tenant-one", extra_headers=headers)) > 0
    session_id = headers["X-Session-ID"]
    assert close(server, session_id, "tenant-three").status_code == 404
    assert close(server, session_id, "tenant-two").status_code == 200


def test_a_client_that_disconnects_leaves_a_session_that_resumes(server: Server) -> None:
    messages, headers = conversation(uuid.uuid4().hex), new_id()
    stream = server.chat(messages, extra_headers=headers, stream=True, max_tokens=400)
    for number, _ in enumerate(stream):
        if number == 3:
            break
    stream.close()
    time.sleep(1)
    again = server.chat(messages, extra_headers=headers)
    assert cached(again) == again.usage.prompt_tokens - 1


def test_stop_strings_end_a_turn_that_resumes(server: Server) -> None:
    messages, headers = conversation(uuid.uuid4().hex), new_id()
    first = server.chat(messages, extra_headers=headers, stop=["a", "e"], max_tokens=50)
    assert first.choices[0].finish_reason == "stop"
    messages += [as_message(first), {"role": "user", "content": "And then?"}]
    assert cached(server.chat(messages, extra_headers=headers)) >= first.usage.prompt_tokens - 1


def test_n_answers_share_one_prompt(server: Server) -> None:
    messages, headers = conversation(uuid.uuid4().hex), new_id()
    first = server.chat(messages, extra_headers=headers, n=3, temperature=1.0, seed=7)
    assert len(first.choices) == 3
    for choice in first.choices:
        branch = [*messages, {"role": "assistant", "content": choice.message.content or ""}]
        branch.append({"role": "user", "content": "And then?"})
        response = server.chat(branch, extra_headers=headers)
        assert cached(response) >= first.usage.prompt_tokens - 1


def test_structured_output_and_tool_calls(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tool = {
        "type": "function",
        "function": {"name": "get_weather", "strict": True, "parameters": schema},
    }
    messages, headers = conversation(uuid.uuid4().hex), new_id()
    waits = server.metric("vllm_stateful_waits_total", kind="tool")
    first = server.chat(
        messages, extra_headers=headers, tools=[tool], tool_choice="required", max_tokens=60
    )
    call = first.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    assert server.metric("vllm_stateful_waits_total", kind="tool") == waits + 1
    messages += [
        {"role": "assistant", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 degrees."},
    ]
    second = server.chat(messages, extra_headers=headers, tools=[tool])
    assert cached(second) >= first.usage.prompt_tokens - 1


def test_priorities_and_parallel_turns(server: Server) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def play(number: int) -> bool:
        reused, context = server.two_turns(
            extra_headers=new_id(), extra_body={"priority": number % 3}
        )
        return reused == context

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(play, range(16)))


def test_prompt_logprobs_take_the_stock_path_and_are_counted(server: Server) -> None:
    before = server.metric("vllm_stateful_bypassed_turns_total", reason="prompt_logprobs")
    client = server.openai()
    client.completions.create(
        model=server.model, prompt="One two three", max_tokens=2, extra_body={"prompt_logprobs": 1}
    )
    after = server.metric("vllm_stateful_bypassed_turns_total", reason="prompt_logprobs")
    assert after == before + 1


def test_reset_prefix_cache_drops_every_session(server: Server) -> None:
    headers = new_id()
    messages = conversation(uuid.uuid4().hex)
    server.chat(messages, extra_headers=headers)
    assert server.metric("vllm_stateful_blocks_pinned") > 0
    assert httpx.post(f"{server.url}/reset_prefix_cache").status_code == 200
    assert server.metric("vllm_stateful_blocks_pinned") == 0
    assert cached(server.chat(messages, extra_headers=headers)) == 0


def test_the_last_turn_of_a_session_keeps_nothing(server: Server) -> None:
    session_id = uuid.uuid4().hex
    headers = {"x-dynamo-session-id": session_id, "x-dynamo-session-final": "true"}
    server.chat(conversation(uuid.uuid4().hex), extra_headers=headers)
    assert close(server, session_id).status_code == 404


def test_metrics_tell_how_turns_found_their_context(server: Server) -> None:
    before = server.metric("vllm_stateful_turns_total", outcome="resumed")
    server.two_turns(extra_headers=new_id())
    assert server.metric("vllm_stateful_turns_total", outcome="resumed") == before + 1
    assert server.metric("vllm_stateful_resume_seconds_count") > 0
    assert server.metric("vllm_stateful_prompt_tokens_reused_total") > 0
    assert server.metric("vllm_stateful_prompt_tokens_computed_total") > 0
