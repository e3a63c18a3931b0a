# SPDX-License-Identifier: Apache-2.0
"""For how long a client wishes the KV of its conversation to be kept.

A client can say so in five ways. A wish is soft: it says what is worth keeping, but never holds
back another request. A wish that cannot be read is ignored, and counted.

    cache_control            Anthropic's breakpoint, `{"type": "ephemeral", "ttl": "5m" | "1h"}`: at
                             system blocks, tools, content blocks (also those in a tool's result),
                             or at the request. Chat clients (OpenRouter, LiteLLM, OpenCode) also
                             send it at messages, their content parts and functions.
    prompt_cache_retention   OpenAI: "in_memory" or "24h"
    prompt_cache_options     OpenAI, in the place of the former: `{"ttl": "30m" | "12h"}`
    x-agent-hint             a header with `pin` or `ttl`, in seconds (`agent_hint`)
    session.retain           a KV hint with the payload `{"seconds": number}`, in process

The longest wish of a request counts, for its whole conversation. Anthropic keeps content before the
last one-hour breakpoint for longer than content that is only before a five-minute breakpoint. Here
a session is kept as a whole, so everything that a turn writes counts as kept for its longest time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from vllm_stateful.request.agent_hint import MAX_SECONDS, seconds_of
from vllm_stateful.types import HintSource

Ttl = Literal["5m", "1h"]

_TTL_SECONDS: dict[Ttl, float] = {"5m": 300.0, "1h": 3600.0}
_DEFAULT_TTL: Ttl = "5m"
_LONGEST_TTL: Ttl = "1h"
# OpenAI drops "in_memory" after 5 to 10 minutes without use.
_RETENTION_SECONDS = {"in_memory": 600.0, "in-memory": 600.0, "24h": MAX_SECONDS}
_OPTIONS_SECONDS = {"30m": 1800.0, "12h": 43_200.0}
_KEY = "cache_control"


@dataclass(frozen=True, slots=True)
class RetentionWish:
    """What a request says about keeping its conversation.

    seconds: how long to keep it without use, from the end of the turn; 0 < seconds <=
        `MAX_SECONDS`.
    ttl: the longest time at its `cache_control` breakpoints; None when it has none.
    """

    seconds: float
    ttl: Ttl | None = None


def retention_wish(body: object, ignored: set[HintSource] | None = None) -> RetentionWish | None:
    """The wish in the parsed JSON body of a chat, responses or messages request.

    Args:
        body: the body.
        ignored: gets the wishes that were looked at and could not be read.

    Raises nothing, whatever the body holds.
    """
    if not isinstance(body, dict):
        return None
    unread = set() if ignored is None else ignored
    ttl = _longest_ttl(body, unread)
    seconds = 0.0 if ttl is None else _TTL_SECONDS[ttl]
    retention = body.get("prompt_cache_retention")
    kept_s = _named_seconds(retention, _RETENTION_SECONDS, HintSource.CACHE_RETENTION, unread)
    options = body.get("prompt_cache_options")
    named = options.get("ttl") if isinstance(options, dict) else None
    options_s = _named_seconds(named, _OPTIONS_SECONDS, HintSource.CACHE_OPTIONS, unread)
    if not isinstance(options, dict | None):
        unread.add(HintSource.CACHE_OPTIONS)
    seconds = max(seconds, kept_s, options_s)
    return RetentionWish(seconds, ttl) if seconds else None


def with_seconds(wish: RetentionWish | None, seconds: float | None) -> RetentionWish | None:
    """The longer one of a wish and of another, of so many seconds."""
    if seconds is None:
        return wish
    if wish is None:
        return RetentionWish(seconds)
    return replace(wish, seconds=max(wish.seconds, seconds))


def hinted_seconds(payload: object) -> float | None:
    """The seconds in the payload of a `session.retain` hint; None when they cannot be read."""
    return seconds_of(payload.get("seconds")) if isinstance(payload, Mapping) else None


def cache_creation(ttl: Ttl, num_written: int) -> dict[str, int]:
    """Anthropic's breakdown of the tokens that a turn wrote: all count for its longest time."""
    return {f"ephemeral_{each}_input_tokens": num_written * (each == ttl) for each in _TTL_SECONDS}


def _named_seconds(
    named: object, times: Mapping[str, float], source: HintSource, ignored: set[HintSource]
) -> float:
    """The seconds of a time that a body names; 0 where it names none, or none that is known."""
    if named is None:
        return 0.0
    seconds = times.get(named, 0.0) if isinstance(named, str) else 0.0
    if not seconds:
        ignored.add(source)
    return seconds


def _longest_ttl(body: dict[Any, Any], ignored: set[HintSource]) -> Ttl | None:
    """The longest time at a breakpoint. Messages are not searched if the head has an hour."""
    longest = None
    for find in (_in_head, _in_messages):
        for control in find(body):
            ttl = _ttl(control)
            if ttl is None and control is not None:
                ignored.add(HintSource.CACHE_CONTROL)
            if ttl == _LONGEST_TTL:
                return ttl
            longest = ttl or longest
    return longest


def _ttl(control: object) -> Ttl | None:
    if not isinstance(control, dict) or control.get("type") != "ephemeral":
        return None
    named = control.get("ttl")
    if named is None:
        return _DEFAULT_TTL
    return next((ttl for ttl in _TTL_SECONDS if ttl == named), None)


def _in_head(body: dict[Any, Any]) -> list[object]:
    """The breakpoints at the request, at the system prompt and at tools."""
    found: list[object] = [body[_KEY]] if _KEY in body else []
    for name in ("system", "tools"):
        blocks = body.get(name)
        if isinstance(blocks, list):
            found += _of_blocks(blocks)
    tools = body.get("tools")
    if isinstance(tools, list):
        found += _of_blocks([tool.get("function") for tool in tools if type(tool) is dict])
    return found


def _in_messages(body: dict[Any, Any]) -> list[object]:
    """The breakpoints at messages, at their blocks and at the blocks of tool results.

    Written as plain loops over local names, because conversations are long and the event loop
    waits.
    """
    key, found = _KEY, []
    for name in ("messages", "input"):
        messages = body.get(name)
        for message in messages if type(messages) is list else ():
            if type(message) is not dict:
                continue
            if key in message:
                found.append(message[key])
            blocks = message.get("content")
            for block in blocks if type(blocks) is list else ():
                if type(block) is not dict:
                    continue
                if key in block:
                    found.append(block[key])
                inner = block.get("content")
                for each in inner if type(inner) is list else ():
                    if type(each) is dict and key in each:
                        found.append(each[key])
    return found


def _of_blocks(blocks: list[Any]) -> list[object]:
    return [block[_KEY] for block in blocks if type(block) is dict and _KEY in block]
