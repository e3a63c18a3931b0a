# SPDX-License-Identifier: Apache-2.0
"""`--stateful-tool-call-check strict` over real requests; the model is made to say each text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from live_server import LiveServer
from local_models import ROOT, SMOLLM2

pytestmark = pytest.mark.e2e

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
MESSAGES: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]


def call(arguments: str) -> str:
    return f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>'


GOOD = call('{"city": "Rome"}')
BAD = call('{"city": "Rome", "days": "three", "why": "not"}')
BAD_START = BAD[: BAD.index(', "why"')]
REASON = 'invalid_tool_call: weather: arguments.days: "three" is not of type integer'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    if not (SMOLLM2 / "config.json").exists():
        pytest.skip("smollm2-135m is not built: run `make model`")
    log = tmp_path_factory.mktemp("server") / "server.log"
    template = ROOT / "benchmarks" / "models" / "smollm2_tools.jinja"
    options = ["--plugin", "stateful", "--stateful-tool-call-check", "strict", "--stateful-strict"]
    options += ["--served-model-name", "smollm2", "--max-model-len", "2048"]
    options += ["--chat-template", str(template), "--stateful-check-invariants"]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    options += ["--worker-extension-cls", "benchmarks.serving.pinned_ids.PinnedIds"]
    with LiveServer(SMOLLM2, log, *options, environment={"PYTHONPATH": str(ROOT)}) as live:
        yield live
        assert live.process.poll() is None, live.last_words()


def ask(server: LiveServer, text: str, messages: list[Any] = MESSAGES, **options: Any) -> Any:
    """A chat whose answer would be this text."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0)
    return client.chat.completions.create(
        model="smollm2",
        messages=messages,
        tools=[TOOL],
        temperature=0,
        max_tokens=200,
        extra_body={"structured_outputs": {"choice": [text]}},
        **options,
    )


def calls(server: LiveServer, result: str) -> float:
    return server.metric("vllm_stateful_tool_calls_checked_total", result=result)


def ended(server: LiveServer, why: str) -> float:
    return server.metric("vllm_stateful_turns_ended_at_tool_call_total", why=why)


def test_one_call_is_one_call_and_the_next_turn_resumes(server: LiveServer) -> None:
    before = calls(server, "valid"), ended(server, "complete")
    whole = ask(server, f"{GOOD}\n{GOOD} and more")
    assert len(whole.choices[0].message.tool_calls) == 2
    first = ask(server, f"{GOOD}\n{GOOD} and more", parallel_tool_calls=False)
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.stop_reason is None
    (found,) = choice.message.tool_calls
    assert json.loads(found.function.arguments) == {"city": "Rome"}
    assert first.usage.completion_tokens < whole.usage.completion_tokens - 10
    assert calls(server, "valid") == before[0] + 3
    assert ended(server, "complete") == before[1] + 1
    messages = [*MESSAGES, {"role": "assistant", "tool_calls": [found.model_dump()]}]
    messages += [{"role": "tool", "tool_call_id": found.id, "content": "Sunny."}]
    second = ask(server, "Sunny.", messages)
    assert second.choices[0].message.content == "Sunny."
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1


def test_an_invalid_call_says_why(server: LiveServer) -> None:
    before = calls(server, "invalid"), ended(server, "invalid")
    choice = ask(server, BAD).choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", REASON)
    assert choice.message.content == BAD_START + ","
    assert not choice.message.tool_calls
    assert calls(server, "invalid") == before[0] + 1
    assert ended(server, "invalid") == before[1] + 1


@pytest.mark.parametrize(
    ("text", "arguments", "reason"),
    [
        (f"{GOOD}\nand", '{"city": "Rome"}', None),
        (BAD, '{"city": "Rome", "days": "three",', REASON),
    ],
)
def test_streaming_says_the_same(
    server: LiveServer, text: str, arguments: str, reason: str | None
) -> None:
    said, last = "", None
    for chunk in ask(server, text, stream=True, parallel_tool_calls=False):
        for choice in chunk.choices:
            for part in choice.delta.tool_calls or []:
                said += part.function.arguments or ""
            last = choice
    assert last is not None
    assert last.finish_reason == "tool_calls"
    assert last.stop_reason == reason
    assert said == arguments


def test_without_tools_the_same_text_is_left_alone(server: LiveServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0)
    made = client.chat.completions.create(
        model="smollm2",
        messages=MESSAGES,
        temperature=0,
        max_tokens=200,
        extra_body={"structured_outputs": {"choice": [BAD]}},
    )
    assert made.choices[0].message.content == BAD
    assert made.choices[0].stop_reason is None


def test_an_anthropic_client_is_told_in_the_stop_sequence(server: LiveServer) -> None:
    tokenized = httpx.post(
        f"{server.url}/tokenize",
        json={"model": "smollm2", "prompt": BAD, "add_special_tokens": False},
    )
    ids = tokenized.json()["tokens"]
    client = anthropic.Anthropic(base_url=server.url, api_key="key", max_retries=0)
    made = client.messages.create(
        model="smollm2",
        messages=MESSAGES,
        max_tokens=len(ids),
        tools=[{"name": "weather", "input_schema": SCHEMA}],
        extra_body={"vllm_xargs": {"pinned_ids": ids}},
    )
    assert (made.stop_reason, made.stop_sequence) == ("stop_sequence", REASON)
    assert [block.text for block in made.content] == [BAD_START + ","]


def test_a_responses_client_is_not_told_and_the_metric_counts(server: LiveServer) -> None:
    before = ended(server, "invalid")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0)
    made = client.responses.create(
        model="smollm2",
        input="What is the weather in Rome?",
        tools=[{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}],
        temperature=0,
        max_output_tokens=200,
        extra_body={"structured_outputs": {"choice": [BAD]}},
    )
    assert made.status == "completed"
    assert made.output_text == BAD_START + ","
    assert ended(server, "invalid") == before + 1
