# SPDX-License-Identifier: Apache-2.0
"""Why was this turn slow? Misses provoked over HTTP, and what the server says of each."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from agents import ADMIN, ALICE, HISTORY, MODEL, SYSTEM, Agent
from live_server import LiveServer
from local_models import ROOT, SMOLLM2
from misses import OVER_HTTP, check
from provoked import PROVOKED

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not (SMOLLM2 / "config.json").exists():
        pytest.skip("smollm2-135m is not built: run `make model`")
    log = tmp_path_factory.mktemp("explained") / "server.log"
    template = ROOT / "benchmarks" / "models" / "smollm2_tools.jinja"
    options = ["--plugin", "stateful", "--stateful-check-invariants", "--block-size", "32"]
    options += ["--served-model-name", MODEL, "--max-model-len", "2048"]
    options += ["--chat-template", str(template), "--stateful-admin-key", ADMIN]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with LiveServer(SMOLLM2, log, *options) as live:
        yield live.url
        assert live.process.poll() is None, live.last_words()


@pytest.mark.parametrize("name", OVER_HTTP)
def test_a_miss_is_rightly_explained(
    url: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check(name, PROVOKED[name](url), capsys)


def test_what_is_no_change_is_no_miss(url: str) -> None:
    """A first turn, an appended one, the same again, other sampling, a history cut short."""
    agent = Agent(url)
    longer = [*HISTORY, {"role": "user", "content": "Go on."}]
    assert agent.turn(agent.says(HISTORY))["missed"]["cause"] == "never_seen"
    for messages, options in (
        (HISTORY, {}),
        (HISTORY, {"temperature": 0.7}),
        (HISTORY[:4], {}),
    ):
        missed = agent.turn(agent.says(messages, **options))["missed"]
        assert (missed["cause"], missed["num_tokens"]) == ("none", 0), messages
    missed = agent.turn(agent.says(longer))["missed"]
    assert missed["cause"] in ("none", "changed")  # the model's own answer was not sent back


def test_a_session_is_followed_from_its_first_turn_to_its_end(url: str) -> None:
    agent = Agent(url)
    agent.says(HISTORY)
    first = agent.get(f"sessions/{agent.session}").json()
    assert (first["turns"], first["state"]) == (1, "waits_for_user")
    assert first["blocks"] > 0
    agent.says([*HISTORY, {"role": "user", "content": "Go on."}])
    turns = agent.get(f"sessions/{agent.session}/turns").json()["turns"]
    assert len(turns) == 2
    assert turns[0]["waited_for"] == "user"
    assert all(turn[name] >= 0 for turn in turns for name in ("queue_s", "first_token_s"))
    assert turns[0]["arrived_at"] <= time.time()


def test_a_fork_names_its_parent(url: str) -> None:
    parent = Agent(url)
    history = [{"role": "system", "content": f"{parent.session}. {SYSTEM}"}, *HISTORY[1:]]
    parent.says(history)
    child = Agent(url)
    turn = child.turn(child.says([*history, {"role": "user", "content": "You are a helper."}]))
    assert turn["outcome"] == "forked"
    assert child.get(f"sessions/{child.session}").json()["parent"] == parent.session
    assert child.session in parent.get(f"sessions/{parent.session}").json()["children"]


def test_what_a_client_counts_is_told(url: str) -> None:
    """A window that counts up (Codex), and a retry (OpenAI's and Anthropic's libraries)."""
    agent = Agent(url)
    window = "x-codex-window-id"
    agent.says(HISTORY, extra_headers={"thread-id": agent.session, window: f"{agent.session}:1"})
    headers = {"thread-id": agent.session, window: f"{agent.session}:2"}
    headers["x-stainless-retry-count"] = "1"
    turn = agent.turn(agent.says(HISTORY, extra_headers=headers))
    assert (turn["window_before"], turn["said"]["window"], turn["said"]["retry"]) == (1, 2, 1)
    said = " ".join(turn["explanation"])
    assert "context window 2, after 1" in said
    assert "had sent it once before" in said


def test_a_hint_in_a_header_names_the_session_and_ends_it(url: str) -> None:
    """As Hermes Agent sends one: base64url of JSON. One that is none is counted, and no more."""
    agent = Agent(url)

    def hint(**said: Any) -> dict[str, str]:
        text = json.dumps({"session_id": agent.session, **said}).encode()
        return {"X-Agent-Hint": base64.urlsafe_b64encode(text).decode().rstrip("=")}

    turn = agent.turn(agent.says(HISTORY, extra_headers=hint(ttl=600, lifecycle="active")))
    assert turn["said"]["source"] == "agent-hint"
    assert agent.get(f"sessions/{agent.session}").json()["state"] == "waits_for_user"
    agent.says(HISTORY, extra_headers=hint(lifecycle="final"))
    assert agent.get(f"sessions/{agent.session}").json()["state"] == "closed"
    agent.says(HISTORY, extra_headers={"X-Agent-Hint": "neither JSON nor base64"})
    for _ in range(30):
        if 'hints_ignored_total{source="agent_hint"} 1.0' in httpx.get(f"{url}/metrics").text:
            return
        time.sleep(0.2)
    pytest.fail("the hint was not counted")


@pytest.mark.parametrize("source", ["conversation", "x-session-affinity"])
def test_names_of_low_rank_name_a_session(url: str, source: str) -> None:
    """As OpenAI's Responses API and OpenCode send them: the second turn continues the first."""
    agent = Agent(url)
    headers = {"Authorization": f"Bearer {ALICE}"}
    asked = {"role": "user", "content": f"{agent.session}: name a colour."}
    body = {"model": MODEL, "input": [asked], "max_output_tokens": 4, "store": False}
    if source == "conversation":
        body |= {"conversation": {"id": agent.session}, "user": "a-user-of-many"}
    else:
        headers[source] = agent.session
    for _ in range(2):
        answer = httpx.post(f"{url}/v1/responses", headers=headers, json=body, timeout=60)
        assert answer.status_code == 200, answer.text
    turns = agent.get(f"sessions/{agent.session}/turns").json()["turns"]
    assert [turn["said"]["source"] for turn in turns] == [source] * 2
    assert turns[0]["outcome"] == "resumed"
