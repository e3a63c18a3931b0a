# SPDX-License-Identifier: Apache-2.0
"""`--data-parallel-size 2`: a conversation stays with the engine core that holds it.

As vLLM starts it: two engine cores, and two API servers that know nothing of each other.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
from live_server import LiveServer
from local_models import ROOT, TINY

from vllm_stateful.compat import probe, uses

HAS_NODES = Path("/sys/devices/system/node/node1").exists()

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        probe.series_of(probe.vllm_version()) != uses.FIRST and not HAS_NODES,
        reason="on a CPU vLLM 0.33 wants a memory node for each engine core; here is one",
    ),
]

NUM_ENGINES = 2
TURNS = 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    if not (TINY / "config.json").exists():
        pytest.skip("the tiny model is not built: run `make model`")
    log = tmp_path_factory.mktemp("server") / "server.log"
    template = ROOT / "benchmarks" / "models" / "smollm2_tools.jinja"
    options = ["--plugin", "stateful", "--stateful-check-invariants"]
    options += ["--data-parallel-size", str(NUM_ENGINES), "--chat-template", str(template)]
    options += ["--served-model-name", "tiny", "--max-model-len", "2048", "--block-size", "32"]
    with LiveServer(TINY, log, *options, environment={"VLLM_CPU_KVCACHE_SPACE": "1"}) as live:
        yield live
        assert live.process.poll() is None, live.last_words()


class Said(NamedTuple):
    """One turn: what it cost and what came."""

    num_prompt: int
    num_cached: int
    text: str


def ask(server: LiveServer, messages: list[Any], key: str, headers: dict[str, str]) -> Said:
    """Over a connection of its own: the kernel deals these out to the API servers."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
        answer = client.chat.completions.create(
            model="tiny",
            messages=messages,
            max_tokens=8,
            temperature=0,
            extra_headers=headers,
        )
    usage = answer.usage
    assert usage is not None
    details = usage.prompt_tokens_details
    cached = 0 if details is None else details.cached_tokens or 0
    return Said(usage.prompt_tokens, cached, answer.choices[0].message.content or "")


def converse(
    server: LiveServer, key: str, headers: dict[str, str], *, may_move: bool = False
) -> list[list[Any]]:
    """A conversation in which every turn finds all of the prompt before it; its prompts.

    Args:
        server: to talk to.
        key: of the tenant.
        headers: of each request.
        may_move: to an engine core with less to do, where it is computed again.
    """
    messages = [
        {"role": "system", "content": "You answer in one word. " * 12},
        {"role": "user", "content": f"What of {uuid.uuid4().hex}? " * 4},
    ]
    prompts, before = [], 0
    for number in range(TURNS):
        said = ask(server, messages, key, headers)
        assert may_move or said.num_cached >= before, (number, said)
        before = said.num_prompt
        prompts.append([*messages, {"role": "assistant", "content": said.text}])
        messages = [*prompts[-1], {"role": "user", "content": f"And the {number}th? " * 4}]
    return prompts


def total(server: LiveServer, name: str, by: str) -> dict[str, float]:
    """The values of a counter by one of its labels."""
    found: dict[str, float] = {}
    for line in httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines():
        if line.startswith(name + "{") and f'{by}="' in line:
            label = line.split(f'{by}="')[1].split('"')[0]
            found[label] = found.get(label, 0.0) + float(line.rsplit(" ", 1)[1])
    return found


def test_named_sessions_resume_in_every_turn(server: LiveServer) -> None:
    for _ in range(3):
        converse(server, "one", {"X-Session-ID": f"session-{uuid.uuid4().hex}"})


def test_conversations_without_a_name_resume_too(server: LiveServer) -> None:
    for _ in range(3):
        converse(server, "one", {})


def test_a_resumed_turn_says_what_a_first_one_says(server: LiveServer) -> None:
    *_, last = converse(server, "one", {})
    asked, answer = last[:-1], last[-1]["content"]
    again = ask(server, asked, "a stranger", {})
    assert again.num_cached == 0
    assert again.text == answer


def test_many_at_once_use_all_engine_cores(server: LiveServer) -> None:
    before = total(server, "vllm:request_success_total", "engine")
    with ThreadPoolExecutor(6) as pool:
        headers = [{"X-Session-ID": f"session-{uuid.uuid4().hex}"} for _ in range(6)]
        list(pool.map(lambda each: converse(server, "one", each, may_move=True), headers))
    after = total(server, "vllm:request_success_total", "engine")
    assert len(after) == NUM_ENGINES
    assert sum(after.values()) - sum(before.values()) == 6 * TURNS
    assert all(after[engine] > before.get(engine, 0.0) for engine in after)


def test_a_closed_session_is_closed_wherever_it_is(server: LiveServer) -> None:
    name = f"session-{uuid.uuid4().hex}"
    converse(server, "one", {"X-Session-ID": name})
    url, headers = f"{server.url}/v1/sessions/{name}", {"Authorization": "Bearer one"}
    assert httpx.delete(url, headers=headers, timeout=30).json()["closed"] >= 1
    assert httpx.delete(url, headers=headers, timeout=30).status_code == 404


def test_the_choices_are_counted(server: LiveServer) -> None:
    server.metric("vllm_stateful_sessions")  # after the next poll
    choices = total(server, "vllm_stateful_engine_choices_total", "why")
    assert choices["home"] > 0
    assert choices["hashed"] > 0
    assert sum(choices.values()) == sum(
        total(server, "vllm:request_success_total", "engine").values()
    )
