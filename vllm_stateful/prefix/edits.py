# SPDX-License-Identifier: Apache-2.0
"""Tells a history that was rewritten from another history that only begins with the same tokens.

Under one session id come rewritten histories (a volatile line in the system prompt, old tool
results dropped) and those of parallel sub-agents. What a rewritten history still has is its last
question: the end of what the model was last asked, a tool's result or the user's message.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from vllm_stateful.prefix.boundaries import Kind
from vllm_stateful.prefix.radix_tree import Ids, Node

NUM_TOKENS = 32
"""Tokens by which a question is recognized: its end, and the marker behind it."""

QUESTIONS = (Kind.USER, Kind.TOOL_RESULT)


def end_of_question(path_up: Iterable[Node[Any]], num_asked: int, num_shared: int) -> Ids | None:
    """The end of a history's last question, if that lies behind the shared tokens.

    Args:
        path_up: the history's nodes, from its end to its beginning.
        num_asked: tokens of its prompt. A question that begins behind them is part of the answer: a
            model that is not stopped goes on with the user's next message.
        num_shared: tokens at the beginning that the new prompt has as well.

    Returns:
        ``NUM_TOKENS`` ids; None when there is no question or it is shorter.
    """
    for node in path_up:
        if node.end - NUM_TOKENS < num_shared:
            return None
        if node.kind in QUESTIONS and node.start < num_asked:
            return node.tokens[-NUM_TOKENS:] if len(node.tokens) >= NUM_TOKENS else None
    return None


class Question(NamedTuple):
    """Where a history's last question lies; its answer follows."""

    start: int
    end: int


def last_question(path_up: Iterable[Node[Any]], num_asked: int) -> Question | None:
    """The last message that a history's model was asked, a tool's result or the user's message.

    Args:
        path_up: the history's nodes, from its end to its beginning.
        num_asked: tokens of its prompt, as in `end_of_question`.

    Returns:
        None where it is not known where messages begin.
    """
    end = None
    for node in path_up:
        if end is None and node.kind in QUESTIONS and node.start < num_asked:
            end = node.end
        if end is not None and node.is_cut:
            return Question(node.start, end)
    return None


def is_found_in(wanted: Ids, tokens: Ids) -> bool:
    """Whether ``wanted`` occurs in ``tokens`` as one run."""
    size = len(wanted)
    if len(tokens) < size:
        return False
    here = np.flatnonzero(tokens[: len(tokens) - size + 1] == wanted[0])
    for offset in range(1, size):
        if not len(here):
            return False
        here = here[tokens[here + offset] == wanted[offset]]
    return bool(len(here))
