# SPDX-License-Identifier: Apache-2.0
"""Render only the messages that a turn adds to a conversation, with an append-only template.

The new messages are rendered behind two that stand for all before them: the first one, which
templates look at, and the last known one, which a message may look back to. What those two give
is cut off, and the rest is appended to the text that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Render = Callable[[Sequence[Any], bool], str]
"""Renders messages in full; the flag says whether a generation prompt follows."""


def continued_text(
    render: Render, messages: Sequence[Any], known_text: str, num_known: int
) -> str | None:
    """The text of a conversation, its generation prompt left out.

    Args:
        render: an append-only template (``append_only.is_append_only``).
        messages: all of them.
        known_text: of the first ``num_known``, without a generation prompt.
        num_known: at least 2.

    Returns:
        None when what was rendered is not of the form that it must have.
    """
    stand_in = [messages[0], messages[num_known - 1]]
    head = render(stand_in, False)
    whole = render([*stand_in, *messages[num_known:]], False)
    return known_text + whole[len(head) :] if whole.startswith(head) else None


def generation_prompt(render: Render, messages: Sequence[Any]) -> str | None:
    """What follows the last message when the model is to answer; None when it is not a suffix."""
    alone = render(messages[:1], False)
    asked = render(messages[:1], True)
    return asked[len(alone) :] if asked.startswith(alone) else None
