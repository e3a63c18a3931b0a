# SPDX-License-Identifier: Apache-2.0
"""`--stateful-response-cache-bytes` with unchanged clients: the same answers, told truthfully."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import openai
import pytest
from live_server import LiveServer
from local_models import ROOT, TINY

pytestmark = pytest.mark.e2e

MODEL = "tiny"
SETTLE_S = 2.5  # the metrics are read once a second
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    if not (TINY / "config.json").exists():
        pytest.skip("the tiny model is not built: run `make model`")
    log = tmp_path_factory.mktemp("server") / "server.log"
    template = ROOT / "benchmarks" / "models" / "smollm2_tools.jinja"
    options = ["--plugin", "stateful", "--stateful-response-cache-bytes", "64M"]
    options += ["--served-model-name", MODEL, "--max-model-len", "2048", "--block-size", "32"]
    options += ["--chat-template", str(template)]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with LiveServer(TINY, log, *options) as live:
        yield live


def messages() -> list[Any]:
    return [{"role": "user", "content": f"What is new about {uuid.uuid4().hex}? " * 3}]


def client(server: LiveServer, key: str = "one") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=120)


def chat(server: LiveServer, asked: list[Any], key: str = "one", **options: Any) -> Any:
    options = {"max_tokens": 12, "temperature": 0, **options}
    return client(server, key).chat.completions.create(model=MODEL, messages=asked, **options)


class Counted:
    """How often each result came while it was open."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server

    def _read(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for line in httpx.get(f"{self._server.url}/metrics", timeout=30).text.splitlines():
            for name in ("vllm_stateful_responses_total", "vllm_stateful_responses_uncached_total"):
                if line.startswith(name + "{"):
                    label = line.split('"')[1]
                    found[label] = found.get(label, 0.0) + float(line.rsplit(" ", 1)[1])
            if line.startswith("vllm:generation_tokens_total"):
                found["generated"] = float(line.rsplit(" ", 1)[1])
        return found

    def __enter__(self) -> Counted:
        time.sleep(SETTLE_S)
        self._before = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(SETTLE_S)
        after = self._read()
        self.results = {
            name: after[name] - self._before.get(name, 0.0)
            for name in after
            if after[name] != self._before.get(name, 0.0) and name != "generated"
        }


def test_the_same_question_has_the_same_answer_without_the_model(server: LiveServer) -> None:
    asked = messages()
    with Counted(server) as counted:
        first, second = chat(server, asked), chat(server, asked)
    assert second.choices == first.choices
    assert second.usage.completion_tokens == first.usage.completion_tokens
    assert second.usage.prompt_tokens == first.usage.prompt_tokens
    assert second.usage.prompt_tokens_details.cached_tokens == second.usage.prompt_tokens
    assert counted.results == {"miss": 1, "stored": 1, "hit": 1}


def streamed(server: LiveServer, asked: list[Any], **options: Any) -> tuple[list[str], Any]:
    options["stream_options"] = {"include_usage": True}
    events = list(chat(server, asked, stream=True, **options))
    texts = [e.choices[0].delta.content for e in events if e.choices and e.choices[0].delta.content]
    return texts, events[-1].usage


def test_a_stream_is_a_stream_again_and_either_kind_knows_the_other(server: LiveServer) -> None:
    asked = messages()
    texts, usage = streamed(server, asked)
    again, usage_again = streamed(server, asked)
    assert "".join(again) == "".join(texts)
    assert len(again) > 1
    assert usage_again.completion_tokens == usage.completion_tokens
    whole = chat(server, asked)
    assert whole.choices[0].message.content == "".join(texts)
    assert whole.usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 13},
        {"stop": ["zzz"]},
        {"logprobs": True},
        {"seed": 5},
        {"frequency_penalty": 0.5},
        {"tools": [TOOL]},
        {"extra_body": {"top_k": 7, "temperature": 0.5}, "seed": 5},
        {"extra_body": {"cache_salt": "mine"}},
        {"extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}},
    ],
)
def test_whatever_is_changed_is_asked_anew(server: LiveServer, options: dict[str, Any]) -> None:
    asked = messages()
    chat(server, asked)
    with Counted(server) as counted:
        first = chat(server, asked, **options)
        second = chat(server, asked, **options)
    assert counted.results == {"miss": 1, "stored": 1, "hit": 1}
    assert second.choices == first.choices


def answered_with_a_call(server: LiveServer, **options: Any) -> list[Any]:
    """A question, not stored, that random weights answer with a whole call in that many tokens."""
    for _ in range(40):
        asked = messages()
        answer = chat(server, asked, extra_headers={"Cache-Control": "no-store"}, **options)
        if answer.choices[0].message.tool_calls:
            return asked
    raise AssertionError("no call in 40 answers")


def test_tool_choice_is_part_of_the_question(server: LiveServer) -> None:
    required: Any = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 60}
    asked = answered_with_a_call(server, **required)
    chat(server, asked, tools=[TOOL], tool_choice="auto")
    with Counted(server) as counted:
        chat(server, asked, tools=[TOOL], tool_choice="none")
        first = chat(server, asked, **required)
        second = chat(server, asked, **required)
    assert counted.results == {"miss": 2, "stored": 2, "hit": 1}
    calls = [answer.choices[0].message.tool_calls for answer in (first, second)]
    assert [call[0].function for call in calls] == [calls[0][0].function] * 2
    assert json.loads(calls[1][0].function.arguments)["city"] in ("Paris", "Rome")


def test_a_stop_string_ends_it_again(server: LiveServer) -> None:
    asked = messages()
    text = chat(server, asked).choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    with Counted(server) as counted:
        first = chat(server, asked, stop=[stop])
        second = chat(server, asked, stop=[stop])
    assert first.choices[0].finish_reason == "stop"
    assert second.choices == first.choices
    assert counted.results == {"miss": 1, "stored": 1, "hit": 1}


def test_an_omitted_temperature_is_drawn_anew(server: LiveServer) -> None:
    asked = messages()
    with Counted(server) as counted:
        for _ in range(2):
            client(server).chat.completions.create(model=MODEL, messages=asked, max_tokens=4)
    assert counted.results == {"sampled": 2}


def test_with_a_seed_it_is_the_same_again_for_each_of_several_choices(server: LiveServer) -> None:
    asked = messages()
    options = {"temperature": 1.0, "seed": 3, "n": 2}
    with Counted(server) as counted:
        first, second = chat(server, asked, **options), chat(server, asked, **options)
    assert second.choices == first.choices
    assert first.choices[0].message.content != first.choices[1].message.content
    assert counted.results == {"miss": 2, "stored": 2, "hit": 2}


def test_tenants_never_share(server: LiveServer) -> None:
    asked = messages()
    with Counted(server) as counted:
        for key in ("one", "two", "two", "one"):
            chat(server, asked, key)
    assert counted.results == {"miss": 2, "stored": 2, "hit": 2}


def test_no_store_and_no_cache_are_respected(server: LiveServer) -> None:
    asked = messages()
    with Counted(server) as counted:
        for value in ("no-store", "private, no-store", "no-cache", "max-age=0", "max-age=60"):
            chat(server, asked, extra_headers={"Cache-Control": value})
    assert counted.results == {"no_store": 2, "miss": 2, "stored": 2, "hit": 1}


def test_what_is_asked_at_the_same_time_is_computed_once(server: LiveServer) -> None:
    asked = messages()
    with Counted(server) as counted, ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: chat(server, asked, max_tokens=200), range(4)))
    assert all(answer.choices == answers[0].choices for answer in answers)
    results = counted.results
    assert results["miss"] == 1
    assert results.get("joined", 0) + results.get("hit", 0) == 3


def test_a_client_that_goes_leaves_the_others_their_answer(server: LiveServer) -> None:
    asked = messages()
    options: dict[str, Any] = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
    stream = chat(server, asked, stream=True, **options)
    next(iter(stream))
    with ThreadPoolExecutor(1) as threads:
        follower = threads.submit(chat, server, asked, **options)
        time.sleep(0.5)
        stream.close()
        answer = follower.result()
    assert answer.usage.completion_tokens == 400
    assert chat(server, asked, **options).choices == answer.choices


def test_other_endpoints_are_answered_too(server: LiveServer) -> None:
    text = uuid.uuid4().hex
    openai_client = client(server)
    claude = anthropic.Anthropic(base_url=server.url, api_key="one", max_retries=0)
    with Counted(server) as counted:
        plain = [
            openai_client.completions.create(
                model=MODEL, prompt=text, max_tokens=8, temperature=0, logprobs=1
            )
            for _ in range(2)
        ]
        responses = [
            openai_client.responses.create(
                model=MODEL, input=text, max_output_tokens=8, temperature=0, store=False
            )
            for _ in range(2)
        ]
        spoken = [
            claude.messages.create(
                model=MODEL,
                max_tokens=8,
                extra_body={"temperature": 0},
                messages=[{"role": "user", "content": text}],
            )
            for _ in range(2)
        ]
    assert plain[1].choices == plain[0].choices
    assert responses[1].output_text == responses[0].output_text
    assert spoken[1].content == spoken[0].content
    assert spoken[1].usage.output_tokens == spoken[0].usage.output_tokens
    assert counted.results == {"miss": 3, "stored": 3, "hit": 3}


def test_an_emptied_prefix_cache_empties_this_one(server: LiveServer) -> None:
    asked = messages()
    chat(server, asked)
    httpx.post(f"{server.url}/reset_prefix_cache", timeout=60).raise_for_status()
    with Counted(server) as counted:
        chat(server, asked)
    assert counted.results == {"miss": 1, "stored": 1}
