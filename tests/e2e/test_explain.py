# SPDX-License-Identifier: Apache-2.0
"""Why was this turn slow? Misses provoked over HTTP, and what the server says of each.

Evictions by pressure, budget and age, recurrent states, adapters and connectors are provoked step
by step in `tests/adapters/test_turn_records.py`.
"""

from __future__ import annotations

import base64
import copy
import json
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from live_server import LiveServer
from local_models import ROOT, SMOLLM2

pytestmark = pytest.mark.e2e

MODEL = "smollm2"
ADMIN = "the-operators-key"
ALICE, BOB = "tenant-alice", "tenant-bob"
SYSTEM = "You are a careful assistant. Today is Monday. Answer in one sentence. " * 6


def tool(name: str) -> dict[str, Any]:
    fields = {"path": {"type": "string"}}
    parameters = {"type": "object", "properties": fields}
    described = {"name": name, "description": f"Runs {name}.", "parameters": parameters}
    return {"type": "function", "function": described}


def call(arguments: str) -> dict[str, Any]:
    function = {"name": "read", "arguments": arguments}
    made = {"id": "call-1", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [made]}


HISTORY: list[dict[str, Any]] = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": "Which file is the largest one in the folder?"},
    {"role": "assistant", "content": "I will look at it.", "reasoning_content": "The user asks."},
    {"role": "user", "content": "Please read it, then."},
    call('{"path": "a.txt"}'),
    {"role": "tool", "tool_call_id": "call-1", "content": "forty lines of text"},
    {"role": "user", "content": "Thank you. What does it say?"},
]
TOOLS = [tool("read"), tool("write")]


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


class Agent:
    """One client with its session."""

    def __init__(self, url: str, key: str = ALICE, session: str | None = None) -> None:
        self.url, self.key = url, key
        self.session = session or f"session-{uuid.uuid4().hex}"
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)

    def says(self, messages: list[Any], **options: Any) -> str:
        """One turn; returns the id of its answer."""
        options = {"tools": TOOLS, "max_tokens": 4, "temperature": 0, **options}
        options.setdefault("extra_headers", {"X-Session-ID": self.session})
        answer = self._client.chat.completions.create(model=MODEL, messages=messages, **options)
        return str(answer.id)

    def get(self, path: str, key: str | None = None, **parameters: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        return httpx.get(f"{self.url}/v1/{path}", headers=headers, params=parameters)

    def turn(self, request_id: str, key: str | None = None, **parameters: Any) -> dict[str, Any]:
        answer = self.get(f"turns/{request_id}", key, **parameters)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


def with_message(place: int, **changes: Any) -> Callable[[list[Any]], None]:
    def change(messages: list[Any]) -> None:
        messages[place].update(changes)

    return change


def read_otherwise(messages: list[Any]) -> None:
    messages[4] = call('{"path": "b.txt"}')


CHANGES: dict[str, tuple[Callable[[list[Any]], Any], int, str]] = {
    "the date in the system line": (
        with_message(0, content=SYSTEM.replace("Monday", "Tuesday")),
        0,
        "system",
    ),
    "white space in the system line": (with_message(0, content=SYSTEM + " "), 0, "system"),
    "a question": (with_message(1, content="Which file is the smallest one here?"), 1, "user"),
    "an answer": (with_message(2, content="I shall look at it."), 2, "assistant"),
    "reasoning, stripped": (with_message(2, reasoning_content=None), 2, "assistant"),
    "a later question": (with_message(3, content="Please open it, then."), 3, "user"),
    "a call's arguments": (read_otherwise, 4, "assistant"),
    "a tool's result": (with_message(5, content="fifty lines of text"), 5, "tool_result"),
    "a message that was taken out": (lambda messages: messages.pop(1), 1, "user"),
    "a message that was put in": (
        lambda messages: messages.insert(3, {"role": "user", "content": "Well?"}),
        3,
        "user",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_history_is_told_by_message_and_kind(url: str, name: str) -> None:
    change, message, kind = CHANGES[name]
    agent = Agent(url)
    agent.says(HISTORY)
    messages = copy.deepcopy(HISTORY)
    change(messages)
    turn = agent.turn(agent.says([*messages, {"role": "user", "content": "Go on."}]))
    missed = turn["missed"]
    assert missed["cause"] == "changed", turn
    assert (missed["message"], missed["kind"]) == (message, kind), turn
    assert missed["token"] > 0
    assert turn["reused_tokens"] in (0, missed["token"])  # 0: too little to be worth a copy
    assert missed["num_tokens"] > 0


@pytest.mark.parametrize(
    "tools",
    [TOOLS[::-1], [*TOOLS, tool("run")], [tool("read")], None],
    ids=["reordered", "one more", "one less", "none"],
)
def test_changed_tools_are_part_of_the_system_message(url: str, tools: Any) -> None:
    agent = Agent(url)
    agent.says(HISTORY)
    options = {} if tools is None else {"tools": tools}
    if tools is None:
        options["tools"] = openai.NOT_GIVEN
    missed = agent.turn(agent.says(HISTORY, **options))["missed"]
    assert (missed["cause"], missed["message"], missed["kind"]) == ("changed", 0, "system")


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


def test_a_closed_session_a_reset_cache_and_what_stock_serves(url: str) -> None:
    agent = Agent(url)
    agent.says(HISTORY)
    headers = {"Authorization": f"Bearer {ALICE}"}
    httpx.delete(f"{url}/v1/sessions/{agent.session}", headers=headers).raise_for_status()
    missed = agent.turn(agent.says(HISTORY))["missed"]
    if missed["num_tokens"]:  # vLLM's own prefix cache has its full blocks
        assert (missed["cause"], missed["why_gone"]) == ("evicted", "closed")
    httpx.post(f"{url}/reset_prefix_cache", timeout=60).raise_for_status()
    missed = agent.turn(agent.says(HISTORY))["missed"]
    assert (missed["cause"], missed["why_gone"]) == ("evicted", "reset")
    assert missed["idle_s"] >= 0
    turn = agent.turn(agent.says(HISTORY, extra_body={"prompt_logprobs": 1}))
    assert turn["outcome"] == "bypassed"
    assert turn["missed"]["why_gone"] == "prompt_logprobs"


def test_another_key_or_salt_is_told_to_whom_it_concerns(url: str) -> None:
    alice = Agent(url)
    bob = Agent(url, BOB, alice.session)
    alice.says(HISTORY)
    request_id = bob.says(HISTORY)
    assert bob.turn(request_id)["missed"]["cause"] == "never_seen"
    assert bob.turn(request_id, ADMIN)["missed"]["cause"] == "other_tenant"
    request_id = alice.says(HISTORY, extra_body={"cache_salt": "a-salt"})
    assert alice.get(f"turns/{request_id}").status_code == 404
    missed = alice.turn(request_id, cache_salt="a-salt")["missed"]
    assert missed["cause"] == "never_seen"
    assert alice.turn(request_id, ADMIN)["missed"]["cause"] == "other_salt"


def test_nothing_of_anothers_is_in_any_answer(url: str) -> None:
    """One tenant plants ids, tools and texts. They are looked for in all that others can read."""
    planted = Agent(url, "planted-tenant", f"planted-{uuid.uuid4().hex}")
    secret = [tool("planted_tool")]
    messages = [{"role": "system", "content": "planted words " * 30}, *HISTORY[1:4]]
    request_id = planted.says(messages, tools=secret)
    planted.says([{"role": "system", "content": "planted text " * 30}, *HISTORY[1:4]], tools=secret)
    assert "planted" in planted.get("sessions").text
    paths = ["sessions", "turns", f"turns/{request_id}", f"sessions/{planted.session}"]
    paths += [f"sessions/{planted.session}/turns"]
    for key in (BOB, "nobody", "planted"):
        for path in paths:
            text = planted.get(path, key).text
            asked = (planted.session, request_id)  # what was asked for is named in the error
            for name in asked:
                text = text.replace(name, "")
            assert "planted" not in text, (key, path)
    metrics = httpx.get(f"{url}/metrics").text
    assert "planted" not in metrics


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


def test_a_request_for_a_title_leaves_the_conversation_as_it_is(url: str) -> None:
    """As OpenCode asks for one: under the session's id, with the question, but without tools."""
    agent = Agent(url)
    agent.says(HISTORY[:2])
    title = [
        {"role": "system", "content": "You write a title for a conversation. Answer in six words."},
        {"role": "user", "content": "Write a title for this conversation:"},
        HISTORY[1],
    ]
    turn = agent.turn(agent.says(title, tools=openai.NOT_GIVEN))
    assert (turn["missed"]["cause"], turn["missed"]["num_tokens"]) == ("side_request", 0)
    assert "stands beside" in turn["explanation"][1]
    turn = agent.turn(agent.says(HISTORY))
    assert turn["missed"]["cause"] in ("none", "changed")  # the model's own answer is not sent back
    assert turn["reused_tokens"] > 200


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
