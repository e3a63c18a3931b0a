# SPDX-License-Identifier: Apache-2.0
"""Sessions that take turns, as token ids. The same ids on every side, as long as answers agree."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from benchmarks.models.shapes import VOCAB

SESSIONS, TURNS = 4, 8
FIRST, ADDED, ANSWER = 1500, 60, 24
"""Tokens: of a first prompt, new in each later one, of an answer."""


@dataclass(frozen=True)
class Workload:
    """How the next prompt follows from a prompt and its answer.

    Attributes:
        name: Also the seed of its token ids.
        shared: Tokens at the start that all sessions have in common.
        kept: The last tokens of an answer that the next prompt repeats.
    """

    name: str
    shared: int = 0
    kept: int = ANSWER

    @property
    def least(self) -> int:
        """Tokens a later turn cannot but compute, with the state of every token at hand.

        The last token of an answer was sampled and never computed, so a whole answer costs one.
        """
        return ADDED + (1 if self.kept == ANSWER else self.kept)

    @property
    def least_first(self) -> int:
        """The same for the first turns of all sessions together."""
        return SESSIONS * FIRST - (SESSIONS - 1) * self.shared


WORKLOADS = (
    Workload("append"),
    Workload("stripped", kept=12),
    Workload("fork", shared=1000),
)


class Answer(NamedTuple):
    """One answer: its token ids, log-probability of the first, prompt tokens read from a cache."""

    tokens: list[int]
    logprob: float
    cached: int


class Turn(NamedTuple):
    """One turn. `prompt_crc` tells whether two sides were asked the same."""

    session: int
    turn: int
    prompt_tokens: int
    prompt_crc: int
    computed: int
    answer: list[int]
    logprob: float


def play(workload: Workload, turns: int, ask: Callable[[str, list[int]], Answer]) -> list[Turn]:
    """Play every session's first turn, then every session's second, and so on.

    Args:
        turns: Of each session.
        ask: Takes a session's id and the token ids of a whole prompt.
    """
    random = Random(workload.name)

    def text(length: int) -> list[int]:
        return [random.randrange(3, VOCAB) for _ in range(length)]

    shared = text(workload.shared)
    histories = [shared + text(FIRST - workload.shared) for _ in range(SESSIONS)]
    played = []
    for turn in range(turns):
        for session, history in enumerate(histories):
            if turn:
                history += text(ADDED)
            said = ask(f"families-{workload.name}-{session}", history)
            crc = zlib.crc32(array("q", history).tobytes())
            computed = len(history) - said.cached
            played.append(
                Turn(session, turn, len(history), crc, computed, said.tokens, said.logprob)
            )
            history += said.tokens[-workload.kept :]
    return played
