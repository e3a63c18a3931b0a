# SPDX-License-Identifier: Apache-2.0
"""Validates chat messages by their shape alone, where the shape shows what validation returns.

vLLM validates each message of a chat request against a union of some ten types, in every turn and
on the event loop. This takes 4 ms for a conversation of 400 messages. Nearly all messages of an
agent have one of four shapes, with text in every field. Validation returns these unchanged, with
the keys in the order of their type. ``plain_message`` does the same, and leaves every other message
to vLLM.

Source: ``ChatCompletionMessageParam`` in vllm/renderers/chat_utils.py and openai/types/chat.
"""

from __future__ import annotations

from typing import Any

_ASKERS = frozenset({"user", "system", "developer"})
_TOOL_CALL = ("id", "function", "type")
_FUNCTION = ("arguments", "name")


def plain_message(message: Any) -> dict[str, Any] | None:
    """What validation returns for a parsed JSON message; None when its shape is not plain.

    Plain messages are: a text of the user, system or developer; an answer of the assistant with a
    text, with function calls, or with both; and the result of a tool.
    """
    if type(message) is not dict:
        return None
    role = message.get("role")
    if role == "assistant":
        return _answer(message)
    content = message.get("content")
    if type(content) is not str:
        return None
    if type(role) is str and role in _ASKERS and len(message) == 2:
        return {"content": content, "role": role}
    if role == "tool" and len(message) == 3 and type(message.get("tool_call_id")) is str:
        return {"content": content, "role": role, "tool_call_id": message["tool_call_id"]}
    return None


def _answer(message: dict[str, Any]) -> dict[str, Any] | None:
    made: dict[str, Any] = {"role": "assistant"}
    if "content" in message:
        content = made["content"] = message["content"]
        if content is not None and type(content) is not str:
            return None
    if "tool_calls" in message:
        calls = message["tool_calls"]
        if type(calls) is not list or not calls:
            return None
        made["tool_calls"] = [_tool_call(call) for call in calls]
        if None in made["tool_calls"]:
            return None
    return made if len(made) == len(message) else None


def _tool_call(call: Any) -> dict[str, Any] | None:
    if type(call) is not dict or len(call) != 3 or call.get("type") != "function":
        return None
    function = call.get("function")
    if type(function) is not dict or len(function) != 2:
        return None
    parts = [call.get("id"), *(function.get(key) for key in _FUNCTION)]
    if any(type(part) is not str for part in parts):
        return None
    ordered = {key: function[key] for key in _FUNCTION}
    return {key: ordered if key == "function" else call[key] for key in _TOOL_CALL}


class SplitMessages:
    """The messages of a request, split into plain ones and those that vLLM must validate.

    Args:
        messages: the parsed JSON messages; not changed.
    """

    def __init__(self, messages: list[Any]) -> None:
        self._made = [plain_message(message) for message in messages]
        self.others = [
            message for message, made in zip(messages, self._made, strict=True) if made is None
        ]
        """The messages that vLLM still has to validate, in order."""

    @property
    def num_plain(self) -> int:
        """The number of messages that vLLM need not validate."""
        return len(self._made) - len(self.others)

    @property
    def plain_places(self) -> list[int]:
        """The indices of the plain messages among all messages."""
        return [place for place, made in enumerate(self._made) if made is not None]

    def joined(self, others: list[Any]) -> list[Any]:
        """All messages after validation, in order.

        Args:
            others: what validation returned for ``self.others``.

        Raises:
            ValueError: ``others`` has another length than ``self.others``.
        """
        if len(others) != len(self.others):
            raise ValueError(f"{len(others)} messages validated, of {len(self.others)}")
        left = iter(others)
        return [next(left) if made is None else made for made in self._made]
