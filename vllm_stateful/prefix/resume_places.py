# SPDX-License-Identifier: Apache-2.0
"""Where a turn should leave resume points, for models that cannot be continued everywhere.

The frontier is a resume point at no cost: a client that appends to the history starts there. The
other places serve histories that come back changed, forks, and sessions with the same beginning:

- The end of the prompt, before any reasoning that the generation prompt opened. Templates strip
  reasoning and write calls anew, so the next prompt often differs from this one from the beginning
  of the answer on. A state taken behind that place cannot be used then.
- The end of system prompt and tools, where new sessions and sub-agents part.
- A place where this prompt differed from a known one that could not be continued there.
- The places where the first segments of the answer begin: a call behind reasoning, for example.
  Templates may write the segment anew and keep what is before it.

Source: *stable conversation boundaries* in TensorRT-LLM and several MLX servers; vLLM's own
``shared_prefix_boundary`` (Marconi, arXiv:2411.19379).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_stateful.prefix.boundaries import Cuts, Kind

MIN_SAVED = 128
"""Tokens that a resume point must save, at least."""

MOST_IN_ANSWER = 2
"""Resume points inside one answer."""


class Place(NamedTuple):
    """A position at which a resume point is wanted."""

    position: int
    is_shared: bool = False
    """Others are expected to start there."""
    is_question: bool = False
    """It is the end of a prompt whose last message is the user's."""
    is_answer: bool = False
    """A segment of the answer begins here."""


def resume_places(
    cuts: Cuts,
    start: int,
    num_prompt: int,
    parted_at: int = 0,
    *,
    is_fork: bool = True,
    before: Kind = Kind.OTHER,
) -> list[Place]:
    """The places that a prompt should leave a resume point at, by position.

    Args:
        cuts: the segments of the prompt that begin behind ``start``.
        start: where the turn continues; nothing before it is computed.
        num_prompt: tokens of the prompt.
        parted_at: where the prompt parts from one that is known; 0 when that is ``start``.
        is_fork: whether that one is of another session; else the session's own history changed.
        before: the kind of the segment that holds the token before ``start``.
    """
    wanted: dict[int, Place] = {}
    if start + MIN_SAVED <= parted_at < num_prompt:
        wanted[parted_at] = Place(parted_at, is_shared=is_fork)
    first = _end_of_instructions(cuts, before)
    if first is not None and start + MIN_SAVED <= first < num_prompt:
        wanted[first] = Place(first, is_shared=True)
    end = _end_of_question(cuts, num_prompt)
    wanted.setdefault(end, Place(end, is_question=_is_question(cuts)))
    return sorted(place for place in wanted.values() if start < place.position <= num_prompt)


def _end_of_instructions(cuts: Cuts, before: Kind) -> int | None:
    """Where the first message of the user begins, if instructions stand before it."""
    kinds = cuts.kinds
    users = np.flatnonzero(kinds == Kind.USER)
    if not len(users):
        return None
    if not users[0]:
        return int(cuts.starts[0]) if before in (Kind.SYSTEM, Kind.TOOLS) else None
    is_first = np.isin(kinds[: users[0]], (Kind.OTHER, Kind.SYSTEM, Kind.TOOLS)).all()
    return int(cuts.starts[users[0]]) if is_first else None


def _is_question(cuts: Cuts) -> bool:
    """Whether the last message before the answer is the user's."""
    said = cuts.kinds[~np.isin(cuts.kinds, (Kind.ASSISTANT, Kind.REASONING))]
    return bool(len(said)) and said[-1] == Kind.USER


def _end_of_question(cuts: Cuts, num_prompt: int) -> int:
    """Where the answer begins: the end of the prompt, before reasoning that it opens."""
    answers = np.flatnonzero(cuts.kinds == Kind.ASSISTANT)
    if not len(answers):
        return num_prompt
    behind = cuts.kinds[answers[-1] :]
    others = ~np.isin(behind, (Kind.ASSISTANT, Kind.REASONING))
    reasoning = np.flatnonzero(behind == Kind.REASONING)
    if others.any() or not len(reasoning):
        return num_prompt
    return int(cuts.starts[answers[-1] + reasoning[0]])
