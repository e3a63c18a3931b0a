# SPDX-License-Identifier: Apache-2.0
"""One request of the soak: sent in one of several manners, read, and compared with stock vLLM's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
}
DEADLINE_S = 60.0
NEAR_TIE = 1e-4
"""Between the two likeliest tokens; float32 rounds otherwise in batches of another size."""

_ENDS = frozenset({"stop", "length", "tool_calls", "end_turn", "max_tokens", "tool_use"})
_ENDS |= {"stop_sequence", "completed", "incomplete"}
_OWN_FIELDS = ("stream", "stream_options", "cache_salt", "session_id", "prompt_cache_key")


@dataclass
class Request:
    """What a client sends.

    Attributes:
        api: a key of `PATHS`.
        breaks_after: the client goes after so many events; None: it stays.
        pause_s: the client sleeps so long after each event.
    """

    api: str
    body: dict[str, Any]
    headers: dict[str, str]
    breaks_after: int | None = None
    pause_s: float = 0.0

    def for_stock(self, model: str) -> Request:
        """The same question, whole, without what names a session or tenant."""
        body = {name: value for name, value in self.body.items() if name not in _OWN_FIELDS}
        body.pop("vllm_xargs", None)
        body.pop("metadata", None)
        return Request(self.api, {**body, "model": model}, {})


@dataclass
class Answer:
    """What came of it, by choice.

    Attributes:
        ends: why each choice ended, as the API says it.
        usage: tokens of the prompt and of the answer.
        is_cut: the client went before the end.
    """

    status: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    ids: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    usage: tuple[int, int] | None = None
    is_cut: bool = False
    problem: str = ""
    stuck: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether every choice ended as an answer ends, by itself."""
        return bool(self.ends) and set(self.ends.values()) <= _ENDS

    def add(self, choice: int, text: str | None, ids: list[int] | None = None) -> None:
        self.texts[choice] = self.texts.get(choice, "") + (text or "")
        if ids:
            self.ids.setdefault(choice, []).extend(ids)


async def send(
    client: httpx.AsyncClient, url: str, request: Request, answer: Answer | None = None
) -> Answer:
    """Never raises for what the server does; `Answer` tells.

    Args:
        answer: filled while it comes; None makes one.
    """
    answer = answer or Answer()
    try:
        async with asyncio.timeout(DEADLINE_S):
            await _exchange(client, url + PATHS[request.api], request, answer)
    except TimeoutError:
        answer.stuck = True
    except httpx.HTTPError as error:
        answer.problem = f"{type(error).__name__}: {error}"
    return answer


async def _exchange(client: httpx.AsyncClient, url: str, request: Request, answer: Answer) -> None:
    if not request.body.get("stream"):
        response = await client.post(url, json=request.body, headers=request.headers)
        answer.status = response.status_code
        if response.status_code != 200:
            answer.problem = response.text[:600]
            return
        _READ_WHOLE[request.api](response.json(), answer)
        return
    async with client.stream("POST", url, json=request.body, headers=request.headers) as response:
        answer.status = response.status_code
        if response.status_code != 200:
            answer.problem = (await response.aread()).decode(errors="replace")[:600]
            return
        number = 0
        async for event in _events(response):
            _read_event(request.api, event, answer)
            number += 1
            if number == request.breaks_after:
                answer.is_cut = True
                return
            if request.pause_s:
                await asyncio.sleep(request.pause_s)


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data:") and line != "data: [DONE]":
            yield json.loads(line[5:])


def _read_event(api: str, event: dict[str, Any], answer: Answer) -> None:
    if event.get("error"):
        answer.problem = json.dumps(event)[:600]
    elif api in ("chat", "completions"):
        _read_choices(event, answer, "delta")
    elif api == "messages":
        delta = event.get("delta") or {}
        if event["type"] == "content_block_delta":
            answer.add(0, delta.get("text") or delta.get("partial_json"))
        elif event["type"] == "message_delta" and delta.get("stop_reason"):
            answer.ends[0] = delta["stop_reason"]
    elif event["type"] == "response.output_text.delta":
        answer.add(0, event["delta"])
    elif event["type"] in ("response.completed", "response.incomplete", "response.failed"):
        answer.ends[0] = event["response"]["status"]


def _read_choices(found: dict[str, Any], answer: Answer, part: str) -> None:
    for choice in found.get("choices") or ():
        said = choice.get(part) or {}
        text = choice.get("text") or said.get("content") or ""
        for call in said.get("tool_calls") or ():
            function = call.get("function") or {}
            text += (function.get("name") or "") + (function.get("arguments") or "")
        answer.add(choice["index"], text, choice.get("token_ids"))
        if choice.get("finish_reason"):
            answer.ends[choice["index"]] = choice["finish_reason"]
    usage = found.get("usage")
    if usage:
        answer.usage = (usage["prompt_tokens"], usage["completion_tokens"])


def _read_message(found: dict[str, Any], answer: Answer) -> None:
    for part in found["content"]:
        answer.add(0, part.get("text") or json.dumps(part.get("input") or ""))
    if found.get("stop_reason"):  # an aborted answer has none
        answer.ends[0] = found["stop_reason"]


def _read_response(found: dict[str, Any], answer: Answer) -> None:
    for item in found["output"]:
        for part in item.get("content") or ():
            answer.add(0, part.get("text"))
    answer.ends[0] = found["status"]


_READ_WHOLE = {
    "chat": lambda found, answer: _read_choices(found, answer, "message"),
    "completions": lambda found, answer: _read_choices(found, answer, "message"),
    "messages": _read_message,
    "responses": _read_response,
}


def difference(found: Answer, wanted: Answer, *, has_text: bool = True) -> str:
    """What is not as stock vLLM has it; empty: nothing. A cut answer is a beginning.

    Args:
        has_text: False compares tokens only: vLLM's tool parser tells an unfinished call
            otherwise in a stream than whole, and in pieces of several tokens, as drafts make them,
            not at all.
    """
    for choice, text in found.texts.items():
        right, ids = wanted.texts.get(choice, ""), found.ids.get(choice, [])
        right_ids = wanted.ids.get(choice, [])
        if found.is_cut:
            if has_text and not right.startswith(text):
                return f"text of choice {choice} is no beginning"
            if right_ids and ids != right_ids[: len(ids)]:
                return f"tokens of choice {choice} are no beginning"
            continue
        if ids and right_ids and ids != right_ids:
            return f"tokens of choice {choice}"
        if has_text and text != right:
            return f"text of choice {choice}"
    if found.is_cut:
        return ""
    if has_text and found.ends != wanted.ends:
        return f"ends {found.ends}, stock {wanted.ends}"
    if found.usage and wanted.usage and found.usage != wanted.usage:
        return f"usage {found.usage}, stock {wanted.usage}"
    return ""


async def is_near_tie(
    client: httpx.AsyncClient, url: str, asked: Request, found: Answer, wanted: Answer
) -> bool:
    """Whether stock vLLM itself was undecided at the first other token."""
    if asked.api not in ("chat", "completions") or not found.ids:
        return False
    more = {"logprobs": True, "top_logprobs": 2} if asked.api == "chat" else {"logprobs": 2}
    body = {**asked.body, **more, "n": 1}
    response = await client.post(url + PATHS[asked.api], json=body, timeout=DEADLINE_S)
    if response.status_code != 200:
        return False
    told = response.json()["choices"][0]["logprobs"]
    for choice, ids in found.ids.items():
        pairs = zip(ids, wanted.ids.get(choice, []), strict=False)
        first = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
        if first is None:
            continue
        if asked.api == "chat":
            best = [top["logprob"] for top in told["content"][first]["top_logprobs"]]
        else:
            best = list(told["top_logprobs"][first].values())
        best = sorted(best, reverse=True)
        return len(best) > 1 and best[0] - best[1] < NEAR_TIE
    return False
