# SPDX-License-Identifier: Apache-2.0
"""Render only the messages that a turn adds to a conversation, with an append-only template.

The new messages are rendered behind two messages that stand for all earlier ones: the first
message, which templates look at, and the last known message, which a new message may look back to.
The text of those two is cut off, and the rest is appended to the known text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Render = Callable[[Sequence[Any], bool], str]
"""Renders messages in full. The flag tells whether to append a generation prompt."""


def continued_text(
    render: Render, messages: Sequence[Any], known_text: str, num_known: int
) -> str | None:
    """The text of a conversation, without a generation prompt.

    Args:
        render: an append-only template (``append_only.is_append_only``).
        messages: all messages of the conversation.
        known_text: the text of the first ``num_known`` messages, without a generation prompt.
        num_known: the number of messages whose text is known, at least 2.

    Returns:
        The text; None when the rendered text does not begin with that of the two messages.
    """
    stand_in = [messages[0], messages[num_known - 1]]
    head = render(stand_in, False)
    whole = render([*stand_in, *messages[num_known:]], False)
    return known_text + whole[len(head) :] if whole.startswith(head) else None


def generation_prompt(render: Render, messages: Sequence[Any]) -> str | None:
    """The text that asks the model to answer, behind the last message; None if not a suffix."""
    alone = render(messages[:1], False)
    asked = render(messages[:1], True)
    return asked[len(alone) :] if asked.startswith(alone) else None
