# SPDX-License-Identifier: Apache-2.0
"""Play the agents' turns: the same turn on each server, one after the other, never two at once."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
from openai import OpenAI

from benchmarks.demo.agents import AGENTS, Agent
from benchmarks.demo.report import Row
from benchmarks.demo.servers import MODEL_NAME, Server
from benchmarks.demo.sides import WITH_PLUGIN
from benchmarks.demo.tools.tool import Tool, whole
from benchmarks.demo.turns import Measured, Session, measure

# A vLLM worker spins for one second after each request and takes a core from the other server.
PAUSE_S = 1.3
WARM_UP_WORDS = (20, 700)
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"


class Player:
    """Plays every agent once on each server.

    Each side is a client of its own. It sends back the answers of its own server, with the results
    of its own tool calls.
    """

    def __init__(self, servers: Mapping[str, Server], run_id: str) -> None:
        self.model = MODEL_NAME
        self._servers = servers
        self._clients = {name: client_of(server) for name, server in servers.items()}
        self._sessions = {
            (name, agent.key): Session(agent, run_id) for name in servers for agent in AGENTS
        }
        self._num_accepted = {name: num_accepted(server) for name, server in servers.items()}

    def play(self, agent: Agent, number: int, note: Callable[[str], None]) -> Row:
        """One turn of one agent on every server."""
        sides: dict[str, Measured] = {}
        for name, client in self._clients.items():
            session = self._sessions[name, agent.key]
            body = session.ask(agent.steps[number])
            note(f"{agent.name}, turn {number + 1}, {name}")
            time.sleep(PAUSE_S)
            sides[name] = measure(client, self.model, session.session_id, body)
            session.advance(sides[name])
        time.sleep(PAUSE_S)
        for name, measured in sides.items():
            before, self._num_accepted[name] = (
                self._num_accepted[name],
                num_accepted(self._servers[name]),
            )
            measured.num_accepted_drafts = self._num_accepted[name] - before
        return Row(agent.name, number + 1, sides)

    def explain(self, rows: list[Row]) -> None:
        """Ask the servers with the plugin why each turn computed what it computed."""
        for row in rows:
            for name in WITH_PLUGIN & row.sides.keys():
                measured = row.sides[name]
                turn = _get(self._servers[name], f"v1/turns/{measured.answer_id}").json()
                measured.explanation = turn["explanation"]


def client_of(server: Server) -> OpenAI:
    """A client that never tries again."""
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def num_accepted(server: Server) -> int:
    """How many drafted tokens this server has accepted so far."""
    lines = _get(server, "metrics").text.splitlines()
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(ACCEPTED)))


def warm_up(servers: Mapping[str, Server]) -> None:
    """Let each server compile what its first requests need, on prompts unlike the agents'."""
    for server in servers.values():
        client = client_of(server)
        for num_words in WARM_UP_WORDS:
            measure(client, MODEL_NAME, f"warm-up-{num_words}", _warm_up_body(num_words))


def _get(server: Server, path: str) -> httpx.Response:
    headers = {"Authorization": "Bearer none"}
    return httpx.get(f"{server.url}/{path}", headers=headers, timeout=30).raise_for_status()


def _count(words: int) -> None:
    """Only its schema is used."""


def _warm_up_body(num_words: int) -> dict[str, Any]:
    tool = Tool(_count, "Count the words.", {"words": whole(0, 9999, "The number of words.")})
    return {
        "messages": [{"role": "user", "content": f"{num_words}: " + "warm " * num_words}],
        "tools": [tool.to_openai()],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 32,
    }
