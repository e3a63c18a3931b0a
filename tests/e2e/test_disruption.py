# SPDX-License-Identifier: Apache-2.0
"""What a turn builds on may be lost at any time: bases, an API server's memory, the engine.

Every turn of every session is answered as stock vLLM answers it. The histories are fixed, so
stock vLLM (``tests/e2e/ask.py``) can be asked the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ask import MAX_TOKENS
from forked import with_vllm
from live_server import LiveServer
from local_models import ROOT, SMOLLM2, TINY

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not (TINY / "config.json").exists(), reason="run `make model`"),
]

ASK = ROOT / "tests" / "e2e" / "ask.py"
NUM_SESSIONS, NUM_TURNS = 5, 6
BASE_BYTES = "60K"
"""About six prompts; the API servers refer to up to twenty."""

OPTIONS = (
    *("--plugin", "stateful", "--stateful-check-invariants", "--stateful-verify-tokens", "1"),
    *("--stateful-base-bytes", BASE_BYTES),
    *("--served-model-name", "tiny", "--max-model-len", "2048", "--block-size", "32"),
)

Messages = list[dict[str, str]]


def messages_of(session: int, num_turns: int) -> Messages:
    """A session up to its ``num_turns``-th question."""
    rules = " ".join(f"Rule {i} of topic {session}: be brief and exact." for i in range(40))
    messages = [{"role": "system", "content": rules}]
    for turn in range(num_turns):
        messages.append({"role": "user", "content": f"What is {session} plus {turn}? " * 3})
        if turn < num_turns - 1:
            messages.append({"role": "assistant", "content": f"It is {session + turn}, I think."})
    return messages


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Any]:
    """Stock vLLM's answers, by session and turn."""
    folder = tmp_path_factory.mktemp("expected")
    names = [(s, t) for t in range(1, NUM_TURNS + 1) for s in range(NUM_SESSIONS)]
    (folder / "in.json").write_text(json.dumps([messages_of(s, t) for s, t in names]))
    files = ("--conversations", folder / "in.json", "--out", folder / "out.json")
    with_vllm().run(ASK, "--model", TINY, *files)
    answers = json.loads((folder / "out.json").read_text())
    return dict(zip(names, answers, strict=True))


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[LiveServer]:
    with LiveServer(TINY, logs / "first.log", *OPTIONS, "--api-server-count", "2") as live:
        yield live


def ask(server: LiveServer, session: int, turn: int) -> dict[str, Any]:
    """One turn, over a connection of its own: either API server may get it."""
    body = {
        "model": "tiny",
        "messages": messages_of(session, turn),
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
    }
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300)
    assert response.status_code == 200, response.text
    return dict(response.json())


def check(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["choices"][0]["message"]["content"] == wanted["text"]
    assert found["usage"]["prompt_tokens"] == len(wanted["prompt"])


def test_evicted_bases_and_changing_api_servers(
    server: LiveServer, expected: dict[tuple[int, int], Any]
) -> None:
    for turn in range(1, NUM_TURNS):
        for session in range(NUM_SESSIONS):
            check(ask(server, session, turn), expected[session, turn])
    sent = {how: server.metric("vllm_stateful_prompts_sent_total", how=how) for how in HOW_SENT}
    print(f"{(NUM_TURNS - 1) * NUM_SESSIONS} answers equal; prompts sent: {sent}")
    assert min(sent.values()) > 0
    assert server.metric("vllm_stateful_prompts_verified_total", result="equal") > 0
    assert server.metric("vllm_stateful_prompts_verified_total", result="different") == 0


HOW_SENT = ("full", "delta", "resent")


def test_a_killed_engine_and_a_new_server(
    server: LiveServer, logs: Path, expected: dict[tuple[int, int], Any]
) -> None:
    """In the middle of an answer. As in stock vLLM the server ends; a new one goes on."""
    body = {
        "model": "tiny",
        "messages": messages_of(0, NUM_TURNS),
        "max_tokens": 1000,  # more than is answered before a busy machine gets to kill
        "n": 4,
        "ignore_eos": True,
        "stream": True,
    }
    url = f"{server.url}/v1/chat/completions"
    processes = psutil.Process(server.process.pid).children(recursive=True)
    (engine,) = [p for p in processes if "EngineCore" in " ".join(p.cmdline())]
    with httpx.stream("POST", url, json=body, timeout=120) as response:
        lines = response.iter_lines()
        next(lines)
        engine.kill()
        try:
            rest = list(lines)
        except httpx.HTTPError:
            rest = []
    assert not any('finish_reason":"length' in line for line in rest)
    server.process.wait(120)
    with LiveServer(TINY, logs / "second.log", *OPTIONS) as again:
        for session in range(NUM_SESSIONS):
            check(ask(again, session, NUM_TURNS), expected[session, NUM_TURNS])


def test_kept_answers_cost_nothing(tmp_path: Path) -> None:
    """``--stateful-history generated``: the turn after an answer computes what is new only."""
    first = messages_of(1, 1)
    question = {"role": "user", "content": "Say it once more."}
    second = [*first, {"role": "assistant", "content": None}, question]
    (tmp_path / "in.json").write_text(json.dumps([first, second]))
    files = ("--conversations", tmp_path / "in.json", "--out", tmp_path / "out.json")
    with_vllm().run(ASK, "--model", SMOLLM2, *files, "--history", "generated")
    one, two = json.loads((tmp_path / "out.json").read_text())
    context = [*one["prompt"], *one["answer"]]
    assert two["prompt"][: len(context)] == context
    assert two["num_cached"] == len(context) - 1
