# SPDX-License-Identifier: Apache-2.0
"""Reads the header ``X-Agent-Hint``, in which an agent says what it knows of its session.

The header is a JSON object, or one in base64url, of at most `MAX_HINT_CHARS` characters. Its schema
was not published when this was written. So what is read is tolerant, and stands here:

    session_id         the session; also `session`: a string, or `{"id": ..., "parent_id": ...}`
    parent_session_id  the session of the agent that started this one
    lifecycle          "final": the session ends with this turn. "active" and "idle" change nothing.
    ttl                seconds without use for which to keep the session
    pin                the same, or true: for `DEFAULT_PIN_S`, if no `ttl` says another time
    next_tools         a list of `{"name": ..., "expected_seconds": ...}`: how long tools will take

Everything is a wish. What cannot be read is ignored, and the rest is heard.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_stateful.request.client_signs import has_control_characters

MAX_HINT_CHARS = 4096
MAX_TOOLS = 16
"""The most tools of a hint that are heard."""

MAX_TOOL_CHARS = 128
MAX_SECONDS = 86_400.0
"""No time in a hint is longer than a day."""

DEFAULT_PIN_S = 300.0
"""The time of a pin without one: that of Anthropic's breakpoints."""

_LIFECYCLES = frozenset({"final", "active", "idle"})


@dataclass(frozen=True, slots=True)
class AgentHint:
    """What an agent said in its header.

    Attributes:
        session: the session, as the agent sent it; None where it names none.
        parent: the session of the agent that started this one, as it was sent.
        is_final: whether the session ends with this turn.
        retain_s: seconds without use for which to keep the session, up to `MAX_SECONDS`; None
            without such a wish.
        tools: how many seconds each tool is expected to take, by its name.
        is_ignored: whether the hint, or some of it, could not be read.
    """

    session: object = None
    parent: object = None
    is_final: bool = False
    retain_s: float | None = None
    tools: tuple[tuple[str, float], ...] = ()
    is_ignored: bool = False


NO_HINT = AgentHint()


def agent_hint(headers: Mapping[str, str]) -> AgentHint:
    """The hint in the headers of a request; `NO_HINT` without one.

    Args:
        headers: looked up by lower-case names.

    Raises nothing for any value.
    """
    sent: object = headers.get("x-agent-hint")
    if sent is None or sent == "":
        return NO_HINT
    said = _parsed(sent)
    return AgentHint(is_ignored=True) if said is None else _read(said)


def seconds_of(value: object) -> float | None:
    """A positive number of seconds, up to `MAX_SECONDS`; None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(min(value, MAX_SECONDS)) if 0 < value < float("inf") else None


def _parsed(sent: object) -> Mapping[str, object] | None:
    if not isinstance(sent, str) or len(sent) > MAX_HINT_CHARS:
        return None
    text: str | bytes = sent.strip()
    try:
        if not sent.lstrip().startswith("{"):
            padded = sent.strip().rstrip("=")
            padded += "=" * (-len(padded) % 4)
            text = base64.b64decode(padded, altchars=b"-_", validate=True)
        parsed = json.loads(text)
    except (ValueError, binascii.Error, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _read(said: Mapping[str, object]) -> AgentHint:
    session, parent, is_named = _session(said)
    lifecycle, lived = said.get("lifecycle"), True
    if lifecycle is not None:
        lived = isinstance(lifecycle, str) and lifecycle in _LIFECYCLES
    retain_s, is_kept = _retained(said)
    tools, are_read = _tools(said.get("next_tools"))
    return AgentHint(
        session,
        parent,
        lifecycle == "final",
        retain_s,
        tools,
        is_ignored=not (is_named and lived and is_kept and are_read),
    )


def _session(said: Mapping[str, object]) -> tuple[object, object, bool]:
    """The session, its parent, and whether all of it could be read."""
    session, parent = said.get("session_id"), said.get("parent_session_id")
    other = said.get("session")
    if isinstance(other, Mapping):
        session = other.get("id") if session is None else session
        parent = other.get("parent_id") if parent is None else parent
    elif session is None:
        session = other
    are_texts = all(each is None or isinstance(each, str) for each in (session, parent))
    return session, parent, are_texts


def _retained(said: Mapping[str, object]) -> tuple[float | None, bool]:
    """For how many seconds to keep the session, and whether all of it could be read."""
    pin, ttl = said.get("pin"), said.get("ttl")
    ttl_s = seconds_of(ttl)
    is_read = ttl is None or ttl_s is not None
    if pin is None:
        return ttl_s, is_read
    if isinstance(pin, bool):
        return (ttl_s or DEFAULT_PIN_S) if pin else None, is_read
    pin_s = seconds_of(pin)
    return max(pin_s or 0.0, ttl_s or 0.0) or None, is_read and pin_s is not None


def _tools(listed: object) -> tuple[tuple[tuple[str, float], ...], bool]:
    """The expected seconds of each tool, and whether all of them could be read.

    A tool without a time is read and says nothing.
    """
    if listed is None:
        return (), True
    if not isinstance(listed, list):
        return (), False
    found: dict[str, float] = {}
    are_read = len(listed) <= MAX_TOOLS
    for each in listed[:MAX_TOOLS]:
        tool = {"name": each} if isinstance(each, str) else each
        name = tool.get("name") if isinstance(tool, Mapping) else None
        if not isinstance(name, str) or not 0 < len(name) <= MAX_TOOL_CHARS:
            are_read = False
            continue
        if has_control_characters(name):
            are_read = False
            continue
        expected = tool.get("expected_seconds")
        expected_s = seconds_of(expected)
        if expected_s is not None:
            found.setdefault(name, expected_s)
        are_read &= expected is None or expected_s is not None
    return tuple(found.items()), are_read
