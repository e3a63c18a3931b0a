# SPDX-License-Identifier: Apache-2.0
"""Play the agents' turns: the same request to each server in turn, never to both at once."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from openai import OpenAI

from benchmarks.demo.agents import AGENTS, Agent
from benchmarks.demo.report import Row
from benchmarks.demo.servers import MODEL_NAME
from benchmarks.demo.tools.tool import Tool, whole
from benchmarks.demo.turns import Measured, Session, measure

# A vLLM worker spins for one second after each request and takes a core from the other server.
PAUSE_S = 1.3
WARM_UP_WORDS = (20, 700)


class Player:
    """Keeps one session for each agent; the first server's answers make the history of both."""

    def __init__(self, clients: Mapping[str, OpenAI], run_id: str) -> None:
        self.model = MODEL_NAME
        self._clients = clients
        self._sessions = {agent.key: Session(agent, run_id) for agent in AGENTS}

    def play(self, agent: Agent, number: int, note: Callable[[str], None]) -> Row:
        """One turn of one agent on every server."""
        session = self._sessions[agent.key]
        before = session.num_prompt_tokens
        body = session.ask(agent.steps[number])
        sides: dict[str, Measured] = {}
        for name, client in self._clients.items():
            note(f"{agent.name}, turn {number + 1}, {name}")
            if len(self._clients) > 1:
                time.sleep(PAUSE_S)
            sides[name] = measure(client, self.model, session.session_id, body)
        history = next(iter(sides.values()))
        is_valid_call = session.advance(history)
        return Row(
            agent=agent.name,
            turn=number + 1,
            tool=", ".join(call.name for call in history.answer.tool_calls) or "(text)",
            num_new_tokens=history.num_prompt_tokens - before,
            sides=sides,
            is_valid_call=is_valid_call,
        )


def warm_up(clients: Mapping[str, OpenAI]) -> None:
    """Let each server compile what its first requests need, on prompts unlike the agents'."""
    for client in clients.values():
        for num_words in WARM_UP_WORDS:
            measure(client, MODEL_NAME, f"warm-up-{num_words}", _warm_up_body(num_words))


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
