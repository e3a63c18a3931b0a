# SPDX-License-Identifier: Apache-2.0
"""Telling a history that was rewritten from another one that only begins alike.

Under one session id come rewritten histories (a volatile line in the system prompt, old tool
results dropped) and those of parallel sub-agents. What a rewritten history still has is its last
question: the end of what the model was last asked, a tool's result or the user's message.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from vllm_stateful.prefix.boundaries import Kind
from vllm_stateful.prefix.radix_tree import Ids, Node

NUM_TOKENS = 32
"""By which a question is known again: its end, and the marker behind it."""

QUESTIONS = (Kind.USER, Kind.TOOL_RESULT)


def end_of_question(path_up: Iterable[Node[Any]], num_shared: int) -> Ids | None:
    """The end of the last question of a history, where it lies behind what is shared.

    Args:
        path_up: the history's nodes, from its end to its beginning.
        num_shared: tokens that the new prompt begins with too.

    Returns:
        ``NUM_TOKENS`` ids; None when there is no question or it is shorter.
    """
    for node in path_up:
        if node.end - NUM_TOKENS < num_shared:
            return None
        if node.kind in QUESTIONS:
            return node.tokens[-NUM_TOKENS:] if len(node.tokens) >= NUM_TOKENS else None
    return None


def is_found_in(wanted: Ids, tokens: Ids) -> bool:
    """Whether a run of ids stands anywhere in others."""
    size = len(wanted)
    if len(tokens) < size:
        return False
    here = np.flatnonzero(tokens[: len(tokens) - size + 1] == wanted[0])
    for offset in range(1, size):
        if not len(here):
            return False
        here = here[tokens[here + offset] == wanted[offset]]
    return bool(len(here))
