# SPDX-License-Identifier: Apache-2.0
"""Clients of a live server, the conversation that they have, and what they ask of it afterwards."""

from __future__ import annotations

import uuid
from typing import Any

import httpx
import openai

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
    call('{"path": "a.txt", "lines": 40}'),
    {"role": "tool", "tool_call_id": "call-1", "content": "forty lines of text"},
    {"role": "user", "content": "Thank you. What does it say?"},
]
TOOLS = [tool("read"), tool("write")]


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
