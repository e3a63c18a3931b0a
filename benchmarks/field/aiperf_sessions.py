# SPDX-License-Identifier: Apache-2.0
"""The sessions that AIPerf synthesizes for ``benchmarks.field.aiperf``, and the room they need.

A row of AIPerf's ``dataset.jsonl`` is a turn. It has the tokens that are new in it, the blocks of
512 tokens that they lie in, and the tokens of its answer. Sessions share blocks where their first
turns begin alike.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROW_BLOCK = 512
"""Tokens of a block of the dataset; the last one of a row may have less."""
BEGIN_TOKENS, TURN_TOKENS = 32, 16
"""At most what the chat template adds to a session, and to each of its turns."""
REPOSITORY = "local/model"
"""What the tokenizer is called in the folder of `offline_tokenizer`."""
REVISION = "0" * 40


class BadSessionsError(ValueError):
    """A dataset is not what AIPerf 0.13 writes, or has no sessions to play."""


@dataclass(frozen=True)
class Row:
    """One turn.

    Attributes:
        new_tokens: Of the prompt, behind the answer of the turn before.
        answer_tokens: How many are asked for.
        blocks: Ids of the blocks of the new tokens, each of `ROW_BLOCK` tokens but for the last.
    """

    new_tokens: int
    answer_tokens: int
    blocks: tuple[int, ...]


Session = tuple[Row, ...]


def recipe(scale: float, mean_turns: int, max_answer_tokens: int) -> dict[str, Any]:
    """The configuration for ``aiperf synthesize``: its own lengths, times `scale`.

    AIPerf's own are 32,000 tokens that all sessions share, 20,000 that those of a group share,
    5,000 of the session's own (median), and then 1,800 new ones a turn and 300 of answer (medians).
    The number of turns is given, as AIPerf's own sessions have dozens: at least 2, `mean_turns` on
    average (at least 3). A session ends early where its context is full.
    """

    def scaled(mean: int, median: int) -> dict[str, float]:
        return {"mean": mean * scale, "median": median * scale}

    turns = {"mean": mean_turns, "median": mean_turns - 1, "min": 2, "max": 3 * mean_turns}
    return {
        "new_tokens_per_turn": scaled(3500, 1800),
        "generation_length": scaled(500, 300) | {"max": max_answer_tokens},
        "cache": {
            "layer1_tokens": round(32_000 * scale),
            "layer1_5_tokens": round(20_000 * scale),
            "layer2": scaled(10_000, 5_000),
        },
        "max_prompt_tokens": round(200_000 * scale),
        "turns": turns | {"allow_truncation": True},
    }


def read(path: Path) -> list[Session]:
    """The sessions of a ``dataset.jsonl``, in the order in which they begin.

    Raises:
        BadSessionsError: a row lacks something, or there is no row.
    """
    sessions: dict[str, list[Row]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            turn = Row(row["input_length"], row["output_length"], tuple(row["hash_ids"]))
            sessions.setdefault(row["session_id"], []).append(turn)
        except (KeyError, TypeError, ValueError) as error:
            raise BadSessionsError(f"{path}, line {number}: {error!r}") from error
    if not sessions:
        raise BadSessionsError(f"{path} has no sessions")
    return [tuple(turns) for turns in sessions.values()]


def longest_tokens(sessions: Sequence[Session]) -> int:
    """Of the longest session with its last answer, template included."""
    return max(
        sum(turn.new_tokens + turn.answer_tokens for turn in session) + template_tokens(session)
        for session in sessions
    )


def template_tokens(session: Session) -> int:
    """At most what the chat template adds to a whole session."""
    return BEGIN_TOKENS + TURN_TOKENS * len(session)


def kept_tokens(sessions: Sequence[Session]) -> int:
    """Of all sessions with their answers, what several of them begin with once."""
    blocks: dict[int, int] = {}
    answers = 0
    for session in sessions:
        answers += sum(turn.answer_tokens for turn in session) + template_tokens(session)
        for turn in session:
            rest = turn.new_tokens
            for block in turn.blocks:
                blocks[block] = min(rest, ROW_BLOCK)
                rest -= blocks[block]
    return sum(blocks.values()) + answers


def cache_blocks(sessions: Sequence[Session], share: float, block_size: int) -> int:
    """The KV blocks that hold this share of all sessions, and at least the longest one.

    Two more for each session: one where it parts from the others, and one for its end.
    """
    whole = math.ceil(kept_tokens(sessions) / block_size) + 2 * len(sessions)
    least = math.ceil(longest_tokens(sessions) / block_size) + 2
    return max(math.ceil(share * whole), least)


def offline_tokenizer(model: Path, folder: Path) -> Path:
    """A folder for ``HF_HOME`` that has the model's tokenizer, named `REPOSITORY`.

    AIPerf 0.13 takes a path for ``--tokenizer`` only for datasets of less than ten prompts.
    """
    repository = folder / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    for file in sorted([*model.glob("*.json"), *model.glob("*.jinja")]):
        shutil.copy(file, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return folder
