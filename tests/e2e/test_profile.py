# SPDX-License-Identifier: Apache-2.0
"""`vllm serve MODEL --plugin stateful --stateful-profile fast`, and what it sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from live_server import LiveServer
from local_models import ROOT, SMOLLM2

pytestmark = pytest.mark.e2e

LINES = "\n".join(f"line {number} of the file: value = {number * 7}" for number in range(12))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    if not (SMOLLM2 / "config.json").exists():
        pytest.skip("smollm2-135m is not built: run `make model`")
    log = tmp_path_factory.mktemp("profile") / "server.log"
    template = ROOT / "benchmarks" / "models" / "smollm2_tools.jinja"
    options = ["--plugin", "stateful", "--stateful-profile", "fast", "--stateful-check-invariants"]
    options += ["--served-model-name", "smollm2", "--max-model-len", "2048"]
    options += ["--chat-template", str(template)]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with LiveServer(SMOLLM2, log, *options) as live:
        yield live
        assert live.process.poll() is None, live.last_words()


def ask(server: LiveServer, messages: list[Any], **options: Any) -> Any:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="a-key", max_retries=0)
    options = {"max_tokens": 48, "temperature": 0, **options}
    headers = {"X-Session-ID": "session-of-the-profile"}
    return client.chat.completions.create(
        model="smollm2", messages=messages, extra_headers=headers, **options
    )


def test_the_log_says_what_was_set(server: LiveServer) -> None:
    log = Path(server.log).read_text(errors="replace")
    assert (
        "--stateful-profile fast sets --stateful-history generated, "
        "--stateful-tool-call-check end, --stateful-drafts on"
    ) in log


def test_what_repeats_is_drafted_and_sessions_resume(server: LiveServer) -> None:
    messages: list[Any] = [{"role": "user", "content": f"Repeat this file.\n{LINES}"}]
    for _ in range(3):
        answer = ask(server, messages)
        messages += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": f"Once more, please.\n{LINES}"},
        ]
    cached = answer.usage.prompt_tokens_details.cached_tokens
    assert cached > len(LINES) // 8
    assert server.metric("vllm_stateful_drafts_accepted_total") > 0


def test_a_call_that_ended_its_turn_is_not_computed_again(server: LiveServer) -> None:
    schema = {"type": "object", "additionalProperties": False, "required": ["city", "days"]}
    schema |= {"properties": {"city": {"enum": ["Oslo", "Lisbon"]}, "days": {"type": "integer"}}}
    function = {"name": "get_weather", "strict": True, "parameters": schema}
    options = {
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    messages: list[Any] = [{"role": "user", "content": f"Read this.\n{LINES}\nThe weather?"}]
    answer = ask(server, messages, **options)
    (call,) = answer.choices[0].message.tool_calls
    assert server.metric("vllm_stateful_turns_ended_at_tool_call_total", why="complete") == 1
    messages += [answer.choices[0].message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    usage = ask(server, messages, **options).usage
    assert server.metric("vllm_stateful_answers_total", result="unfinished") == 0
    known = answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= known - 2


def test_a_request_that_is_not_drafted_for_is_answered(server: LiveServer) -> None:
    messages = [{"role": "user", "content": "Hello."}]
    plain = ask(server, messages).choices[0].message.content
    forced = ask(server, messages, logit_bias={"504": 100}, max_tokens=4).choices[0].message.content
    assert len(set(forced.split())) == 1
    assert forced != plain
