# SPDX-License-Identifier: Apache-2.0
"""Short loads that move the metrics: each plays on one kind of server."""

import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx

from benchmarks.demo.servers import MODEL_NAME
from benchmarks.demo.tools.tool import Tool, choice, whole

Message = dict[str, Any]

TOOL_S = 1.5
"""Seconds that a tool takes: sessions wait, and each scrape sees what changed since the last."""

RULES = " ".join(f"Rule {number}: answer in one short sentence." for number in range(24))
CLOSED_CALL = '<tool_call>\n{"name": "forecast", "arguments": {"city": "Oslo", "days": 3}}\n'


def forecast(city: str, days: int) -> None:
    """Only its schema is used."""


KEPT = ("role", "content", "tool_calls")
"""What of an answer goes back to the server."""

FORECAST = Tool(
    forecast,
    "The weather of the next days.",
    {
        "city": choice(["Oslo", "Lisbon", "Vienna"], "The city."),
        "days": whole(1, 9, "How many days."),
    },
).to_openai()


class Agent:
    """One conversation with a server.

    Args:
        url: of the server.
        key: the API key of its tenant.
        session: its id; without one the server finds the session by its content.
        rules: the system message.
    """

    def __init__(self, url: str, key: str = "one", session: str = "", rules: str = RULES) -> None:
        self.url = url
        self.key = key
        self.session = session
        self.messages: list[Message] = [{"role": "system", "content": rules}]

    def say(self, text: str, **fields: Any) -> dict[str, Any]:
        """One turn of the user; the answer is kept."""
        self.messages.append({"role": "user", "content": text})
        return self.go_on(**fields)

    def result(self, text: str, **fields: Any) -> dict[str, Any]:
        """One turn with the result of the last call; the answer is kept."""
        calls = self.messages[-1].get("tool_calls") or [{"id": "call-none"}]
        self.messages.append({"role": "tool", "tool_call_id": calls[0]["id"], "content": text})
        return self.go_on(**fields)

    def go_on(self, **fields: Any) -> dict[str, Any]:
        """Send the conversation as it is, and keep the answer."""
        message = self.ask(**fields)["choices"][0]["message"]
        kept = {name: message[name] for name in KEPT if message.get(name)}
        self.messages.append({"content": "", **kept})
        return message

    def ask(self, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
        """Send the conversation as it is. Raises httpx.HTTPStatusError when it is refused."""
        body = {
            "model": MODEL_NAME,
            "messages": self.messages,
            "temperature": 0,
            "max_tokens": 24,
        }
        named = {"X-Session-ID": self.session} if self.session else {}
        return post(self.url, "chat/completions", body | fields, self.key, named | (headers or {}))


def post(
    url: str, path: str, body: dict[str, Any], key: str, headers: dict[str, str] | None = None
) -> dict[str, Any]:
    """The answer to one request. Raises httpx.HTTPStatusError when it is refused."""
    sent = {"Authorization": f"Bearer {key}"} | (headers or {})
    answer = httpx.post(f"{url}/v1/{path}", json=body, headers=sent, timeout=300)
    made: dict[str, Any] = answer.raise_for_status().json()
    return made


def at_once(calls: Sequence[Callable[[], Any]]) -> None:
    """Several requests at the same time."""
    with ThreadPoolExecutor(len(calls)) as threads:
        list(threads.map(lambda call: call(), calls))


def name(what: str) -> str:
    """A session id that no other run has."""
    return f"{what}-{uuid.uuid4().hex[:12]}"


def play_agents(url: str) -> None:
    """Everything that a server with one engine core and a small KV cache can show."""
    calling = {
        "tools": [FORECAST],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 60,
    }
    for part in (_call_tools, _check_calls, _repeat, _edit, _fork, _talk_long, _diagnose, _press):
        part(url, calling)
        time.sleep(TOOL_S)


def _call_tools(url: str, calling: dict[str, Any]) -> None:
    """Three agents of two tenants, and their tools."""
    agents = [Agent(url, key, name("agent")) for key in ("one", "one", "two")]
    for agent in agents:
        agent.say(f"Compare the weather of the cities for {agent.session}.", **calling)
    for number in range(4):
        for agent in agents:
            time.sleep(TOOL_S / 3)
            agent.result(f'{{"day": {number}, "high_c": [12, 14, 13], "sky": "sun"}}', **calling)


def _check_calls(url: str, calling: dict[str, Any]) -> None:
    """Calls that no tool of the request allows, that are cut short, and that cannot be judged."""
    agent = Agent(url)
    agent.messages.append({"role": "user", "content": "The weather?"})
    auto = calling | {"tool_choice": "auto"}
    for wrong in ("sooner", 'forecast", "arguments": {"city": "Rome'):
        text = f'<tool_call>\n{{"name": "{wrong}", "arguments": {{}}}}\n</tool_call>'
        agent.ask(**auto, structured_outputs={"choice": [text]})
        time.sleep(TOOL_S)
    agent.ask(**auto | {"max_tokens": 8}, structured_outputs={"choice": [CLOSED_CALL]})
    time.sleep(TOOL_S)
    for number in range(2):
        agent.ask(**calling, min_tokens=4 + number)
        time.sleep(TOOL_S)


def _repeat(url: str, _: dict[str, Any]) -> None:
    """Requests that equal one before, or one in flight; and some that may not be remembered."""
    agent = Agent(url)
    for number in range(3):
        agent.messages[1:] = [{"role": "user", "content": f"Name the river number {number}."}]
        agent.ask()
        agent.ask()
        agent.ask(headers={"Cache-Control": "no-store"})
        agent.ask(temperature=0.8)
        time.sleep(TOOL_S)
        agent.messages[1:] = [{"role": "user", "content": f"Name the mountain number {number}."}]
        at_once([agent.ask] * 3)
        agent.ask(prompt_logprobs=1)
        time.sleep(TOOL_S)


def _edit(url: str, _: dict[str, Any]) -> None:
    """Histories that come back changed, in each kind of message."""
    for _again in range(2):
        for place in (0, 1, 2, 1):
            agent = Agent(url, session=name("edited"))
            agent.say("What is the capital of Austria, and what is it known for?")
            agent.say("And of Portugal? " * 4)
            agent.messages[place] = agent.messages[place] | {"content": "Something else. " * 12}
            agent.say("And of Norway?")
            time.sleep(TOOL_S / 2)


def _fork(url: str, _: dict[str, Any]) -> None:
    """Sub-agents that begin alike, one after the other, and then all at once."""
    for number in range(3):
        shared = f"Plan {number}. " + f"{RULES} " * 5
        agents = [Agent(url, session=name("worker"), rules=shared) for _ in range(4)]
        at_once([partial(agent.say, f"I am {agent.session}.") for agent in agents])
        time.sleep(TOOL_S)


def _talk_long(url: str, _: dict[str, Any]) -> None:
    """A conversation of many short messages, told by its content alone."""
    agent = Agent(url, rules="Answer in one word.")
    for number in range(9):
        agent.messages += [
            {"role": "user", "content": f"What is {number} and {number}?"},
            {"role": "assistant", "content": f"{2 * number}."},
        ]
    for number in range(6):
        agent.say(f"And {number} and one?", max_tokens=6)
        time.sleep(TOOL_S / 2)


def _diagnose(url: str, _: dict[str, Any]) -> None:
    """A client of Anthropic that asks why less was reused."""
    body: dict[str, Any] = {
        "model": MODEL_NAME,
        "max_tokens": 8,
        "system": RULES,
        "messages": [{"role": "user", "content": "What is the capital of Spain?"}],
    }
    previous = None
    for number in range(4):
        changed = {"system": f"Number {number}. {RULES}"} if number % 2 else {}
        asked = {"diagnostics": {"previous_message_id": previous}}
        previous = post(url, "messages", body | changed | asked, "one")["id"]
        time.sleep(TOOL_S)


def _press(url: str, _: dict[str, Any]) -> None:
    """More sessions than the KV cache holds, and one that is closed."""
    agents = [Agent(url, session=name("waiting")) for _ in range(12)]
    for number in range(2):
        for agent in agents:
            agent.say(f"Tell a story about {agent.session}, part {number}. " * 6)
    headers = {"Authorization": "Bearer one"}
    listed = httpx.get(f"{url}/v1/sessions?limit=100", headers=headers, timeout=30).json()
    held = [each["session_id"] for each in listed["sessions"] if each["blocks"]]
    for session in held[:2]:
        closed = httpx.delete(f"{url}/v1/sessions/{session}", headers=headers, timeout=30)
        closed.raise_for_status()
        time.sleep(TOOL_S)


def play_turns(url: str) -> None:
    """Sessions that take turns: more of them than the KV cache holds, some of them edited."""
    agents = [Agent(url, session=name("turns")) for _ in range(8)]
    for number in range(4):
        for agent in agents:
            agent.say(f"Part {number} of {agent.session}. " * 5, max_tokens=8)
            time.sleep(TOOL_S / 6)
        agents[number].messages[1] = {"role": "user", "content": "Another question. " * 5}


def play_many(url: str) -> None:
    """Sessions with and without a name, several at once."""
    agents = [
        Agent(url, session=name("many") if number % 2 else "", rules=f"Talk {number}. {RULES}")
        for number in range(6)
    ]
    for number in range(4):
        text = f"Part {number} of this talk. " * 5
        at_once([partial(agent.say, text, max_tokens=8) for agent in agents])
        time.sleep(TOOL_S)
