# SPDX-License-Identifier: Apache-2.0
"""Thirty and more provoked misses by name, each with its right explanation.

A turn misses something if it computes what an earlier turn had computed. `OVER_HTTP` is provoked on
a real server, in `tests/e2e/test_explain.py`. What that server cannot provoke (adapters, recurrent
states, a cache that is too small) is `IN_STEPS`, provoked on vLLM's scheduler in
`tests/adapters/test_misses_in_steps.py`. `check` asks the API and the command for each of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import httpx
import pytest

from vllm_stateful.cli.__main__ import main


class Miss(NamedTuple):
    """The right explanation of a turn."""

    cause: str
    says: str
    """What the command must say of it."""
    message: int | None = None
    kind: str | None = None
    """What is at the place of a change."""
    why_gone: str | None = None
    num_missed: range = range(1)
    """Tokens that the turn computed although they had been computed before."""


class Asked(NamedTuple):
    """Where a turn can be asked for, and by whom."""

    url: str
    request_id: str
    key: str
    salt: str | None = None


SOME = range(1, 1 << 20)
WORDS = {
    "system": "the system message",
    "user": "a user message",
    "assistant": "an answer",
    "reasoning": "the reasoning of an answer",
    "tool_call": "a tool call",
    "tool_result": "a tool's result",
}
FIRST = Miss("never_seen", "The first turn of its session.")
SIDE = Miss("side_request", "it has no tools and no earlier answer")


def changed(message: int, kind: str) -> Miss:
    says = f", in messages[{message}]: {WORDS[kind]}."
    return Miss("changed", says, message, kind, num_missed=SOME)


def evicted(why: str, words: str) -> Miss:
    return Miss("evicted", f"after its last use: {words}.", why_gone=why, num_missed=SOME)


def bypassed(why: str, words: str) -> Miss:
    return Miss("bypassed", f"Stock vLLM served it: {words}.", why_gone=why)


CLOSED = evicted("closed", "the session was closed")
RESET = evicted("reset", "the prefix cache was reset")

OVER_HTTP: dict[str, Miss] = {
    "the date in the system line": changed(0, "system"),
    "white space in the system line": changed(0, "system"),
    "the first words, so that less than a block is the same": changed(0, "system"),
    "a header of the client in the system message (Messages API)": changed(0, "system"),
    "the instructions (Responses API)": changed(0, "system"),
    "tools, reordered": changed(0, "system"),
    "tools, one more": changed(0, "system"),
    "tools, one less": changed(0, "system"),
    "tools, none": changed(0, "system"),
    "tools, a date in a description": changed(0, "system"),
    "a question": changed(1, "user"),
    "an answer": changed(2, "assistant"),
    "reasoning, stripped": changed(2, "assistant"),  # its marks are no tokens of this vocabulary
    "a later question": changed(3, "user"),
    "a call's arguments": changed(4, "assistant"),
    "a call's arguments, serialized with their keys in another order": changed(4, "assistant"),
    "a tool's result": changed(5, "tool_result"),
    "a tool's result, cleared by its client": changed(5, "tool_result"),
    "the last question, so that all but a block is the same": changed(6, "user"),
    "a message that was taken out": changed(1, "user"),
    "a message that was put in": changed(3, "user"),
    "a history that was replaced by a summary": changed(1, "user"),
    "a first turn": FIRST,
    "another key, for its client": FIRST,
    "another key, for the operator": Miss("other_tenant", "known with another API key"),
    "another salt, for its client": FIRST,
    "another salt, for the operator": Miss("other_salt", "known with another cache_salt"),
    "a request for a title": SIDE,
    "a session that was closed": CLOSED,
    "a session whose client had said that it was over": CLOSED,
    "a cache that was reset": RESET,
    "log-probabilities of the prompt": bypassed(
        "prompt_logprobs", "it asks for log-probabilities of its prompt"
    ),
}

IN_STEPS: dict[str, Miss] = {
    "reasoning, stripped, of a model with marks for it": changed(2, "reasoning"),
    "a call, of a model with marks for it": changed(2, "tool_call"),
    "a result, of a model with marks for it": changed(3, "tool_result"),
    "other turns needed the blocks": evicted("pressure", "other turns needed its blocks"),
    "other sessions were kept instead": evicted(
        "budget", "waiting sessions kept more than --stateful-pin-fraction"
    ),
    "a turn too large to be kept": evicted(
        "budget", "waiting sessions kept more than --stateful-pin-fraction"
    ),
    "a session that was not used for long": evicted(
        "idle", "it was not used for --stateful-idle-seconds"
    ),
    "a turn that was preempted, and given up": evicted("preempted", "vLLM preempted its turn"),
    "a first turn that was preempted, and given up": evicted(
        "preempted", "vLLM preempted its turn"
    ),
    "a turn that failed": evicted("error", "its turn failed"),
    "a first turn that failed": evicted("error", "its turn failed"),
    "a turn that ran while the cache was reset": RESET,
    "a turn that ran while its session was closed": CLOSED,
    "a history cut short, without a resume point there": Miss(
        "snapshot_missing", "can go on at resume points only", num_missed=SOME
    ),
    "another adapter": Miss("other_lora", "known with another LoRA adapter"),
    "an answer, though another session shares more": changed(2, "assistant"),
    "a request not to read the cache": bypassed(
        "skip_reading_prefix_cache", "it asks not to use what is cached"
    ),
}

MISSES = {**OVER_HTTP, **IN_STEPS}
assert len(MISSES) == len(OVER_HTTP) + len(IN_STEPS) >= 30


def check(name: str, asked: Asked, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Ask the API and `vllm-stateful explain` for a turn; both must explain it rightly.

    Returns:
        The turn, as the API tells it.
    """
    miss = MISSES[name]
    salt = {} if asked.salt is None else {"cache_salt": asked.salt}
    headers = {"Authorization": f"Bearer {asked.key}"}
    answer = httpx.get(f"{asked.url}/v1/turns/{asked.request_id}", headers=headers, params=salt)
    assert answer.status_code == 200, answer.text
    turn: dict[str, Any] = answer.json()
    missed = turn["missed"]
    found = (missed["cause"], missed["message"], missed["kind"], missed["why_gone"])
    assert found == (miss.cause, miss.message, miss.kind, miss.why_gone), turn
    assert missed["num_tokens"] in miss.num_missed, turn
    if miss.cause == "changed" and turn["outcome"] != "forked":  # another session may have more
        assert turn["reused_tokens"] in (0, missed["token"])  # 0: too little to be worth a copy

    words = ["explain", asked.url, asked.request_id, "--api-key", asked.key]
    capsys.readouterr()
    assert main(words if asked.salt is None else [*words, "--salt", asked.salt]) == 0
    head, *sentences, _ = capsys.readouterr().out.split("\n")
    assert head == f"{turn['request_id']} (session {turn['session_id']})"
    assert [each.strip() for each in sentences if each] == turn["explanation"]
    assert miss.says in sentences[1]
    count = f"{missed['num_tokens']:,} token"
    assert any(each.strip().startswith(count) for each in sentences) == (miss.num_missed is SOME)
    return turn
