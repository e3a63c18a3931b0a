# SPDX-License-Identifier: Apache-2.0
"""Tells what a request is made of: whether it offers tools, and whether it has an earlier answer.

Agents send more under one session id than the turns of their conversation. They ask for a title,
for the prefix of a command, or whether a topic is new. Such a request has a system message of its
own, one question, no tools, and no earlier answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from vllm_stateful.types import Shape

_ANSWERS = frozenset({"assistant", "tool", "function"})
_MESSAGE_TYPES = frozenset({None, "message"})


def shape_of(body: Mapping[str, object]) -> Shape:
    """The shape of the JSON body of a chat, responses or messages request.

    Raises nothing, whatever the body holds.
    """
    for name in ("tools", "functions"):
        offered = body.get(name)
        if isinstance(offered, list) and offered:
            return Shape.TOOLS
    if body.get("previous_response_id") or body.get("conversation"):
        return Shape.OTHER  # its history is not in the body
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, str):
        return Shape.BARE
    if not isinstance(messages, list) or not messages:
        return Shape.OTHER
    return Shape.OTHER if any(map(_is_of_answer, messages)) else Shape.BARE


def is_prepared_only(body: Mapping[str, object]) -> bool:
    """Whether a chat or responses request asks to prepare its prompt, and for no answer.

    OpenAI's ``prompt_cache_options.prewarm``. Raises nothing, whatever the body holds.
    """
    options = body.get("prompt_cache_options")
    return isinstance(options, Mapping) and options.get("prewarm") is True


def num_inline_system(body: Mapping[str, object]) -> int:
    """The number of system messages in mid-conversation of a messages request.

    Raises nothing, whatever the body holds.
    """
    messages = body.get("messages")
    if not isinstance(messages, list):
        return 0
    are_system = [type(each) is dict and each.get("role") == "system" for each in messages]
    return sum(itertools.dropwhile(bool, are_system))


def _is_of_answer(message: object) -> bool:
    """Whether a message, or another item of an input, is of an earlier answer or its tools."""
    if not isinstance(message, Mapping):
        return False
    role, kind = message.get("role"), message.get("type")
    is_message = kind is None or (isinstance(kind, str) and kind in _MESSAGE_TYPES)
    return not is_message or (isinstance(role, str) and role in _ANSWERS)
