# SPDX-License-Identifier: Apache-2.0
"""Provokes the misses of `misses.OVER_HTTP` on a live server."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import httpx
import openai
from agents import ADMIN, ALICE, BOB, HISTORY, MODEL, SYSTEM, TOOLS, Agent, call, tool
from misses import Asked

Provoke = Callable[[str], Asked]
Change = Callable[[list[Any]], Any]

TITLE = "You write a title for a conversation. Answer in six words."
SUMMARY = "This is what we have done so far: a file of forty lines was found, and it was read."


def asked(agent: Agent, request_id: str, key: str = ALICE, salt: str | None = None) -> Asked:
    return Asked(agent.url, request_id, key, salt)


def history(change: Change) -> Provoke:
    """A second turn whose history was changed."""

    def provoke(url: str) -> Asked:
        agent = Agent(url)
        agent.says(HISTORY)
        messages = copy.deepcopy(HISTORY)
        change(messages)
        return asked(agent, agent.says([*messages, {"role": "user", "content": "Go on."}]))

    return provoke


def message(place: int, **changes: Any) -> Provoke:
    return history(lambda messages: messages[place].update(changes))


def arguments(text: str) -> Provoke:
    (made,) = call(text)["tool_calls"]
    return message(4, tool_calls=[made])


def tools(changed: Any) -> Provoke:
    """A second turn with other tools, or with another option of a turn."""

    def provoke(url: str) -> Asked:
        agent = Agent(url)
        agent.says(HISTORY)
        return asked(agent, agent.says(HISTORY, tools=changed))

    return provoke


def dated(day: str) -> dict[str, Any]:
    made = copy.deepcopy(tool("read"))
    made["function"]["description"] = f"Reads a file. Today is {day}."
    return made


def dated_tools(url: str) -> Asked:
    agent = Agent(url)
    agent.says(HISTORY, tools=[dated("Monday")])
    return asked(agent, agent.says(HISTORY, tools=[dated("Tuesday")]))


def post(agent: Agent, path: str, body: dict[str, Any]) -> str:
    headers = {"Authorization": f"Bearer {agent.key}", "X-Session-ID": agent.session}
    body = {"model": MODEL, "temperature": 0, **body}
    answer = httpx.post(f"{agent.url}/v1/{path}", headers=headers, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def messages_api(url: str) -> Asked:
    """As Claude Code begins its system message."""
    agent = Agent(url)
    request_id = ""
    for digest in ("a1b2c", "d3e4f"):
        header = {"type": "text", "text": f"x-client-version: 2.1; cch={digest};"}
        body = {"system": [header, {"type": "text", "text": SYSTEM}], "max_tokens": 4}
        request_id = post(agent, "messages", {**body, "messages": HISTORY[1:2]})
    return asked(agent, request_id)


def responses_api(url: str) -> Asked:
    agent = Agent(url)
    request_id = ""
    for day in ("Monday", "Tuesday"):
        body = {"instructions": SYSTEM.replace("Monday", day), "max_output_tokens": 4}
        request_id = post(agent, "responses", {**body, "input": "Hello, you.", "store": False})
    return asked(agent, request_id)


def put_in(messages: list[Any]) -> None:
    messages.insert(3, {"role": "user", "content": "Well?"})


def summarize(messages: list[Any]) -> None:
    messages[1:] = [{"role": "user", "content": SUMMARY}]


def first(url: str) -> Asked:
    agent = Agent(url)
    return asked(agent, agent.says(HISTORY))


def other_key(reader: str) -> Provoke:
    def provoke(url: str) -> Asked:
        alice = Agent(url)
        alice.says(HISTORY)
        bob = Agent(url, BOB, alice.session)
        return asked(bob, bob.says(HISTORY), reader)

    return provoke


def other_salt(reader: str, salt: str | None) -> Provoke:
    def provoke(url: str) -> Asked:
        alice = Agent(url)
        alice.says(HISTORY)
        request_id = alice.says(HISTORY, extra_body={"cache_salt": "a-salt"})
        assert alice.get(f"turns/{request_id}").status_code == 404
        return asked(alice, request_id, reader, salt)

    return provoke


def title(url: str) -> Asked:
    """As OpenCode asks for one: under the session's id, with the question, but without tools."""
    agent = Agent(url)
    agent.says(HISTORY[:2])
    wish = {"role": "user", "content": "Write a title for this conversation:"}
    messages = [{"role": "system", "content": TITLE}, wish, HISTORY[1]]
    request_id = agent.says(messages, tools=openai.NOT_GIVEN)
    turn = agent.turn(agent.says(HISTORY))
    assert turn["missed"]["cause"] in ("none", "changed")  # the model's own answer is not sent back
    assert turn["reused_tokens"] > 200
    return asked(agent, request_id)


def own_history(agent: Agent) -> list[dict[str, Any]]:
    """One of which no other session has anything."""
    return [{"role": "system", "content": f"{agent.session}. {SYSTEM}"}, *HISTORY[1:]]


def closed(url: str) -> Asked:
    """What vLLM's own prefix cache has of it, its full blocks, is not missed."""
    agent = Agent(url)
    messages = own_history(agent)
    agent.says(messages)
    headers = {"Authorization": f"Bearer {ALICE}"}
    httpx.delete(f"{url}/v1/sessions/{agent.session}", headers=headers).raise_for_status()
    return asked(agent, agent.says(messages))


def said_to_be_over(url: str) -> Asked:
    agent = Agent(url)
    messages, named = own_history(agent), {"x-dynamo-session-id": agent.session}
    agent.says(messages, extra_headers={**named, "x-dynamo-session-final": "true"})
    return asked(agent, agent.says(messages, extra_headers=named))


def reset(url: str) -> Asked:
    agent = Agent(url)
    agent.says(HISTORY)
    httpx.post(f"{url}/reset_prefix_cache", timeout=60).raise_for_status()
    return asked(agent, agent.says(HISTORY))


def log_probabilities(url: str) -> Asked:
    agent = Agent(url)
    short = {"messages": HISTORY[1:2], "tools": openai.NOT_GIVEN}
    agent.says(**short)
    return asked(agent, agent.says(**short, extra_body={"prompt_logprobs": 1}))


PROVOKED: dict[str, Provoke] = {
    "the date in the system line": message(0, content=SYSTEM.replace("Monday", "Tuesday")),
    "white space in the system line": message(0, content=SYSTEM + " "),
    "the first words, so that less than a block is the same": message(0, content=f"Hm. {SYSTEM}"),
    "a header of the client in the system message (Messages API)": messages_api,
    "the instructions (Responses API)": responses_api,
    "tools, reordered": tools(TOOLS[::-1]),
    "tools, one more": tools([*TOOLS, tool("run")]),
    "tools, one less": tools([tool("read")]),
    "tools, none": tools(openai.NOT_GIVEN),
    "tools, a date in a description": dated_tools,
    "a question": message(1, content="Which file is the smallest one here?"),
    "an answer": message(2, content="I shall look at it."),
    "reasoning, stripped": message(2, reasoning_content=None),
    "a later question": message(3, content="Please open it, then."),
    "a call's arguments": arguments('{"path": "b.txt", "lines": 40}'),
    "a call's arguments, serialized with their keys in another order": arguments(
        '{"lines": 40, "path": "a.txt"}'
    ),
    "a tool's result": message(5, content="fifty lines of text"),
    "a tool's result, cleared by its client": message(5, content="[old result was cleared]"),
    "the last question, so that all but a block is the same": message(6, content="Thanks!"),
    "a message that was taken out": history(lambda messages: messages.pop(1)),
    "a message that was put in": history(put_in),
    "a history that was replaced by a summary": history(summarize),
    "a first turn": first,
    "another key, for its client": other_key(BOB),
    "another key, for the operator": other_key(ADMIN),
    "another salt, for its client": other_salt(ALICE, "a-salt"),
    "another salt, for the operator": other_salt(ADMIN, None),
    "a request for a title": title,
    "a session that was closed": closed,
    "a session whose client had said that it was over": said_to_be_over,
    "a cache that was reset": reset,
    "log-probabilities of the prompt": log_probabilities,
}
