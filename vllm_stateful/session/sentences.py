# SPDX-License-Identifier: Apache-2.0
"""Explains a turn of ``/v1/turns`` in plain English: what it reused, and why not more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_stateful.session.turn_record import Cause

_NAMES = {
    "system": "the system message",
    "tools": "the descriptions of tools",
    "user": "a user message",
    "assistant": "an answer",
    "reasoning": "the reasoning of an answer",
    "tool_call": "a tool call",
    "tool_result": "a tool's result",
    "other": "text before the first message, or of a role that is not known",
}

_GONE = {
    "pressure": "other turns needed its blocks",
    "budget": "waiting sessions kept more than --stateful-pin-fraction",
    "idle": "it was not used for --stateful-idle-seconds",
    "preempted": "vLLM preempted its turn",
    "reset": "the prefix cache was reset",
    "error": "its turn failed",
    "closed": "the session was closed",
    "not_kept": "the turn before it left nothing",
}

_BYPASSED = {
    "multimodal": "an image or a sound in it is too short to be told from others",
    "prompt_embeds": "its prompt is not made of tokens",
    "prompt_logprobs": "it asks for log-probabilities of its prompt",
    "skip_reading_prefix_cache": "it asks not to use what is cached",
    "pooling": "it is no generation",
    "streaming_input": "its prompt arrives in parts",
    "prefix_caching_off": "prefix caching is off",
}


def explained(turn: Mapping[str, Any]) -> list[str]:
    """The sentences that explain a turn, the most important first.

    Args:
        turn: a turn as ``/v1/turns`` gives it.
    """
    missed = turn["missed"]
    sentences = [_summary(turn), reason(missed)]
    if missed["num_tokens"]:
        sentences.append(f"{_tokens(missed['num_tokens'])} had been computed before.")
    if missed.get("num_behind_snapshot"):
        behind = _tokens(missed["num_behind_snapshot"])
        sentences.append(f"The same before that, but without a resume point: {behind}.")
    if "before" in missed and missed["before"] is not None:
        sentences += [f"Before: {missed['before']!r}", f"Now:    {missed['now']!r}"]
    if turn["drafted_tokens"]:
        right, drafted = turn["accepted_draft_tokens"], turn["drafted_tokens"]
        sentences.append(f"{right:,} of {drafted:,} drafted tokens were right.")
    return sentences + _of_client(turn) + [_times(turn)]


def _summary(turn: Mapping[str, Any]) -> str:
    loaded = turn["loaded_tokens"]
    from_tier = f", {loaded:,} loaded" if loaded else ""
    return (
        f"{turn['outcome'].capitalize()}: of {_tokens(turn['prompt_tokens'])}, "
        f"{turn['reused_tokens']:,} reused{from_tier}, {turn['computed_tokens']:,} computed."
    )


def _tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"


def reason(missed: Mapping[str, Any]) -> str:
    """Why a turn did not reuse more, in one sentence, from the ``missed`` field of the turn."""
    cause = Cause(missed["cause"])
    why = missed.get("why_gone")
    if cause is Cause.CHANGED:
        message = missed.get("message")
        where = "" if message is None else f", in messages[{message}]"
        name = _NAMES.get(missed.get("kind") or "other", "")
        return f"The history changed at token {missed['token']:,}{where}: {name}."
    if cause is Cause.EVICTED:
        when = ""
        if missed.get("gone_s") is not None:
            gone, idle = seconds(missed["gone_s"]), seconds(missed["idle_s"])
            when = f" {gone} ago, {idle} after its last use"
        return f"The KV of the session was given back{when}: {_GONE.get(why or '', why)}."
    if cause is Cause.BYPASSED:
        return f"Stock vLLM served it: {_BYPASSED.get(why or '', why)}."
    return _SAYINGS[cause]


_SAYINGS = {
    Cause.NONE: "Nothing that was computed before was computed again.",
    Cause.NEVER_SEEN: "The first turn of its session.",
    Cause.SNAPSHOT_MISSING: "The model can go on at resume points only, and none was further on.",
    Cause.SIDE_REQUEST: "It stands beside its session's history: it has no tools and no earlier "
    "answer, as requests for a title have none.",
    Cause.OTHER_TENANT: "Its session id is known with another API key, which shares nothing.",
    Cause.OTHER_SALT: "Its session id is known with another cache_salt, which shares nothing.",
    Cause.OTHER_LORA: "Its session id is known with another LoRA adapter, which shares nothing.",
}


def _of_client(turn: Mapping[str, Any]) -> list[str]:
    said, found = turn["said"], []
    before, window = turn["window_before"], said["window"]
    if before is not None and window > before:
        found.append(
            f"Its client has begun context window {window}, after {before}: it has replaced its "
            "history by a summary."
        )
    if said["merged"]:
        one = said["merged"] == 1
        found.append(
            f"Its client sent {said['merged']} system message{'' if one else 's'} in "
            f"mid-conversation. vLLM merged {'it' if one else 'them'} into the first one, because "
            "the chat template wants the only system message in front: each new one changes the "
            "beginning of the prompt."
        )
    if said["compaction"]:
        found.append("Its client said that it summarizes its history.")
    if said["retry"]:
        times = "once" if said["retry"] == 1 else f"{said['retry']} times"
        found.append(f"Its client had sent it {times} before.")
    if said["rejected"]:
        found.append(f"A session id that it sent was not used: {said['rejected']}.")
    return found


def _times(turn: Mapping[str, Any]) -> str:
    parts = []
    if turn["waited_s"] is not None:
        parts.append(f"waited {seconds(turn['waited_s'])} for {turn['waited_for']} before it")
    names = (("queue_s", "in the queue"), ("first_token_s", "to the first token"))
    for name, label in (*names, ("decode_s", "decoding")):
        if turn[name] is not None:
            parts.append(f"{seconds(turn[name])} {label}")
    return "Times: " + ", ".join(parts) + "."


def seconds(value: float) -> str:
    """A duration as text for people: in ms, s or min."""
    if value < 1:
        return f"{1000 * value:.0f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.0f} min"
