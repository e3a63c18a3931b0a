# SPDX-License-Identifier: Apache-2.0
"""Whether the rendered answer in a history means the same as the answer that was generated.

A client sends an answer back as it got it: text as text, a tool call as a name and arguments. The
chat template writes the call anew, mostly with other white space in its JSON. Two answers mean the
same when their tool calls are equal as JSON values, and the pieces of text between them are equal
except for white space around each piece. Anything else is a different answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

_ARGUMENT_KEYS = ("arguments", "parameters")


class _DuplicateKeyError(ValueError):
    """An object has the same key twice. Readers may differ in which value they take."""


def means_the_same(rendered: str, generated: str) -> bool:
    """Compare an answer in a rendered history with the one that was generated.

    Args:
        rendered: the assistant's text in the new prompt, without its end-of-turn token.
        generated: the decoded answer, without its end-of-turn token.
    """
    if rendered == generated:
        return True
    left, right = list(_pieces(rendered)), list(_pieces(generated))
    return len(left) == len(right) and all(map(_equal, left, right))


def _pieces(text: str) -> Iterator[str | dict[str, Any]]:
    """Yield alternately text, stripped of white space around it, and tool calls as JSON values."""
    decoder = json.JSONDecoder(
        object_pairs_hook=_without_duplicates, parse_float=Decimal, parse_constant=str
    )
    begin = place = 0
    while (place := text.find("{", place)) >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            place += 1
            continue
        if not _is_tool_call(value):
            place = end
            continue
        yield text[begin:place].strip()
        yield value
        begin = place = end
    yield text[begin:].strip()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _DuplicateKeyError
    return made


def _is_tool_call(value: Any) -> bool:
    """Whether a value has the form ``{"name": ..., "arguments": {...}}``. Other JSON is text."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return False
    return any(isinstance(value.get(key), dict) for key in _ARGUMENT_KEYS)


def _equal(left: Any, right: Any) -> bool:
    """Whether two values are equal in value and type, so that 1, 1.0 and true differ."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(_equal, left, right))
    return bool(left == right)
