# SPDX-License-Identifier: Apache-2.0
"""Recorded request times as one stream of turns over numbered blocks.

The files are described in the README of the traces; they are not part of this repository.
"""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[np.int64]

NEVER = 1 << 60
"""The next use of a block that is not used again."""

KVCT, MOONCAKE = "timing_dev_claudecode-kvct.jsonl", "timing_dev_mooncake-conversation.jsonl"
DEFAULT_SERVICE_S = 5.0
"""Of a request whose log does not say how long the server took."""

TOKEN_S = 0.02
"""Time per answered token, where the log says nothing about times at the server."""


@dataclass(eq=False, slots=True)
class Turn:
    """One request.

    Attributes:
        thread: whose turn it is: a session, or a sub-agent in one.
        space: blocks have the same meaning within one space.
        blocks: its prompt; a block stands for itself and all before it.
        arrived_s: on the clock of the whole stream.
        ended_s: when its answer was complete.
        calls_tool: whether the answer called a tool.
        next_use: for each block the number of the next turn that has it, or ``NEVER``.
        returns_s: when the next turn of the thread arrives; infinite when there is none.
    """

    thread: Hashable
    space: Hashable
    blocks: Blocks
    arrived_s: float
    ended_s: float
    calls_tool: bool
    next_use: Blocks | None = None
    returns_s: float = math.inf


def read_kvct(folder: Path, hours: float, seed: int = 0) -> list[Turn]:
    """Claude Code sessions, 64 tokens a block; sessions arrive at random over some hours.

    Args:
        folder: of the traces.
        hours: the sessions, in random order, arrive as a Poisson process of this length.
        seed: of order and arrivals.
    """
    sessions = defaultdict(list)
    for row in _rows(folder / KVCT):
        sessions[row["session"]].append(row)
    names = sorted(sessions)
    chance = random.Random(seed)
    chance.shuffle(names)
    turns: list[Turn] = []
    start_s = 0.0
    for name in names:
        start_s += chance.expovariate(len(names) / (hours * 3600))
        turns += _kvct_session(name, sessions[name], start_s)
    return in_order(turns)


def _kvct_session(name: str, rows: Iterable[dict[str, Any]], start_s: float) -> list[Turn]:
    turns = []
    before: dict[str, Blocks] = {}
    for row in sorted(rows, key=lambda row: float(row["t"])):
        agent = row["agent"]
        kept = before.get(agent, np.empty(0, np.int64))[: row["keep_blocks"]]
        new = [np.arange(first, first + count) for first, count in row["new_runs"]]
        blocks = before[agent] = np.concatenate([kept, *new])
        arrived_s = start_s + row["t"]
        ended_s = arrived_s + (row["api_time_s"] or DEFAULT_SERVICE_S)
        calls_tool = row["stop"] != "end_turn"
        turns.append(Turn((name, agent), name, blocks, arrived_s, ended_s, calls_tool))
    return turns


def read_mooncake(folder: Path) -> list[Turn]:
    """An hour of chat requests, 512 tokens a block, at their own times."""
    turns = []
    for row in _rows(folder / MOONCAKE):
        blocks = np.array(row["prefix_hash_ids"], np.int64)
        ended_s = row["t"] + TOKEN_S * row["output_tokens"]
        turns.append(Turn(row["session"], "all", blocks, row["t"], ended_s, calls_tool=False))
    return in_order(turns)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def in_order(turns: Iterable[Turn]) -> list[Turn]:
    """The turns that have blocks, by arrival, with what the future holds filled in."""
    ordered = sorted((t for t in turns if len(t.blocks)), key=lambda turn: turn.arrived_s)
    seen: dict[Hashable, Blocks] = {}
    later: dict[Hashable, float] = {}
    for number in range(len(ordered) - 1, -1, -1):
        turn = ordered[number]
        turn.returns_s = later.get(turn.thread, math.inf)
        later[turn.thread] = turn.arrived_s
        known = seen.get(turn.space, np.empty(0, np.int64))
        size = int(turn.blocks.max()) + 1
        if size > len(known):
            more = np.full(max(size, 2 * len(known)) - len(known), NEVER, np.int64)
            known = seen[turn.space] = np.concatenate([known, more])
        turn.next_use = known[turn.blocks]
        known[turn.blocks] = number
    return ordered


def working_set(turns: Sequence[Turn]) -> int:
    """The most blocks that threads between their first and last turn had at one time."""
    last = {turn.thread: number for number, turn in enumerate(turns)}
    sizes: dict[Hashable, int] = {}
    live = most = 0
    for number, turn in enumerate(turns):
        before = sizes.get(turn.thread, 0)
        sizes[turn.thread] = 0 if last[turn.thread] == number else len(turn.blocks)
        most = max(most, live - before + len(turn.blocks))
        live += sizes[turn.thread] - before
    return most
