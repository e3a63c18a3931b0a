# SPDX-License-Identifier: Apache-2.0
"""Valid requests with one to three random faults, by seed, and a difference made smaller."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from benchmarks.reliability.fuzz_answers import Case
from benchmarks.reliability.fuzz_bodies import EMOJI, NUL, SPECIAL, SURROGATE, Json, valid_requests
from benchmarks.reliability.fuzz_cases_agents import SHORT, VALUES

Path = tuple[str | int, ...]

MAX_FAULTS = 3
BYTES_SHARE = 0.2
HEADER_SHARE = 0.2
SHRINK_TRIES = 80

_VALUES: tuple[Json, ...] = (
    *(None, True, False, 0, 1, -1, 3, 1.5, 65536, 2**63, float("nan")),
    *("", "x", "auto", "none", "user", "assistant", "tool", "text", "k" * 9000),
    *(SURROGATE, NUL, EMOJI, SPECIAL),
    *([], {}, [None], ["x"], [[]], {"a": 1}, {"type": "text", "text": "x"}, {"type": "function"}),
    {"type": "ephemeral"},
)
_KEYS = (
    *("cache_control", "name", "content", "tool_calls", "tool_call_id", "reasoning", "type"),
    *("session_id", "cache_salt", "prompt_cache_key", "metadata", "stream", "tools", "tool_choice"),
    *("stop", "logprobs", "echo", "seed", "response_format", "continue_final_message", "x"),
)
_BYTES = (
    b"\x00",
    b"\xff",
    b"\xed\xa0\xbd",
    b'"',
    b"{",
    b"]",
    b",",
    b"\\u",
    b"\\ud83d",
    b"\n",
    b" ",
)


def mutated(seed: int, number: int) -> list[Case]:
    """So many requests; the same for the same seed."""
    return [
        _one(random.Random(f"{seed}/{each}"), f"random {seed}/{each}") for each in range(number)
    ]


def _one(draw: random.Random, name: str) -> Case:
    path, valid = draw.choice(valid_requests())
    headers = ()
    if draw.random() < HEADER_SHARE:
        headers = ((draw.choice(SHORT), draw.choice(list(VALUES.values()))),)
    sent = copy.deepcopy(valid)
    for _ in range(draw.randint(1, MAX_FAULTS)):
        _change(draw, sent)
    if draw.random() >= BYTES_SHARE:
        return Case(name, path, sent, headers)
    raw = bytearray(json.dumps(sent, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    where = draw.randrange(len(raw))
    raw[where : where + draw.randint(0, 2)] = draw.choice(_BYTES)
    return Case(name, path, bytes(raw), headers)


def _change(draw: random.Random, sent: Json) -> None:
    """Change, delete, duplicate, retype or add one node, in place."""
    paths = list(_paths(sent))
    if not paths:
        return
    path = draw.choice(paths)
    parent, key = _at(sent, path[:-1]), path[-1]
    kind = draw.choice(("retype", "delete", "duplicate", "add", "move"))
    if kind == "retype":
        parent[key] = copy.deepcopy(draw.choice(_VALUES))
    elif kind == "delete":
        del parent[key]
    elif kind == "move":
        parent[key] = copy.deepcopy(_at(sent, draw.choice(paths)))
    elif isinstance(parent, list):
        parent.insert(draw.randint(0, len(parent)), copy.deepcopy(parent[key]))
    else:
        value = parent[key] if kind == "duplicate" else draw.choice(_VALUES)
        parent[draw.choice(_KEYS)] = copy.deepcopy(value)


def shrunk(case: Case, differs: Callable[[Case], bool]) -> Case:
    """The case without what the difference does not need. A few tries, not all."""
    if isinstance(case.body, bytes):
        return case
    tries = SHRINK_TRIES
    if case.headers and differs(replace(case, headers=())):
        case = replace(case, headers=())
    progress = True
    while progress and tries > 0:
        progress = False
        for path in sorted(_paths(case.body), key=len):
            smaller = copy.deepcopy(case.body)
            del _at(smaller, path[:-1])[path[-1]]
            tries -= 1
            if differs(replace(case, body=smaller)):
                case, progress = replace(case, body=smaller), True
                break
            if tries <= 0:
                break
    return case


def _paths(node: Json, path: Path = ()) -> Iterator[Path]:
    """Every node below the root."""
    if isinstance(node, dict):
        items: list[tuple[str | int, Json]] = list(node.items())
    else:
        items = list(enumerate(node)) if isinstance(node, list) else []
    for key, value in items:
        yield (*path, key)
        yield from _paths(value, (*path, key))


def _at(node: Json, path: Path) -> Json:
    for key in path:
        node = node[key]
    return node
