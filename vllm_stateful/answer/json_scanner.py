# SPDX-License-Identifier: Apache-2.0
"""Reads one JSON object or array as it arrives, and finds where it could be closed.

A *cut* is a place at which the text becomes a complete document if all open brackets are closed. It
is behind an opening or closing bracket, or behind a complete value. What follows the last cut (a
key, half a string, a number that may go on) is left out of the document.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 64
"""The most open brackets; a document with more is not judged."""

_STRING_STOP = re.compile(r'["\\]')
_STRUCTURE = re.compile(r'["{}\[\],:]')
_NOT_SPACE = re.compile(r"[^ \t\n\r]")
_CLOSER = {"{": "}", "[": "]"}


class DuplicateKeyError(ValueError):
    """An object has the same key twice. Which value counts is not known before its end."""


class JsonScanner:
    """One document in a text that grows.

    Args:
        start: the place in the text where the document begins. White space may come before it.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self.end: int | None = None
        """The place behind the last bracket; None until the document is complete."""
        self.fault: str | None = None
        """Why this cannot become a document, whatever text follows; None while it can."""
        self.is_too_deep = False
        self.cut = 0
        """The last cut; 0 before the first."""
        self.num_open = 0
        """Open brackets at the cut. This is the number of containers that may still grow: the root,
        the last value in it, and so on."""
        self._closers = ""
        self._stack: list[str] = []
        self._pos = start
        self._in_string = False
        self._last = ""

    def scan(self, text: str) -> bool:
        """Read on to the end of ``text`` or of the document.

        Returns:
            Whether there is a new cut.
        """
        before = self.cut
        if not self._stack and self.end is None and not self._open(text):
            return self.cut != before
        while self._pos < len(text) and self.end is None and self.fault is None:
            if not (self._string(text) if self._in_string else self._structure(text)):
                break
        return self.cut != before

    def document(self, text: str) -> Any:
        """The parsed document up to the last cut.

        Raises:
            json.JSONDecodeError: this is not JSON, whatever follows.
            ValueError: Python cannot read it (a number with thousands of digits).
            DuplicateKeyError: an object has the same key twice.
        """
        return json.loads(
            text[self.start : self.cut] + self._closers, object_pairs_hook=_without_duplicates
        )

    def _open(self, text: str) -> bool:
        found = _NOT_SPACE.search(text, self._pos)
        if found is None:
            return False
        if found.group() not in _CLOSER:
            self.fault = "it is no JSON object"
            return False
        self._pos = found.end()
        self._take(found.group())
        return True

    def _string(self, text: str) -> bool:
        """Go to the end of a string; False if the text ends first."""
        found = _STRING_STOP.search(text, self._pos)
        if found is None:
            self._pos = len(text)
            return False
        if found.group() == "\\":
            if found.end() == len(text):
                self._pos = found.start()
                return False
            self._pos = found.end() + 1
            return True
        self._pos = found.end()
        self._in_string = False
        if self._last == ":" or self._stack[-1] == "]":
            self._cut_at(self._pos)
        return True

    def _structure(self, text: str) -> bool:
        found = _STRUCTURE.search(text, self._pos)
        self._pos = len(text) if found is None else found.end()
        if found is not None:
            self._take(found.group())
        return found is not None

    def _take(self, letter: str) -> None:
        if letter == '"':
            self._in_string = True
            return
        self._last = letter
        if letter in _CLOSER:
            self._stack.append(_CLOSER[letter])
            self.is_too_deep |= len(self._stack) > MAX_DEPTH
            self._cut_at(self._pos)
        elif letter == ",":
            self._cut_at(self._pos - 1)
        elif letter != ":":
            self._close(letter)

    def _close(self, letter: str) -> None:
        if self._stack.pop() != letter:
            self.fault = "its brackets do not match"
            return
        self._cut_at(self._pos)
        if not self._stack:
            self.end = self._pos

    def _cut_at(self, place: int) -> None:
        self.cut = place
        self.num_open = len(self._stack)
        self._closers = "".join(reversed(self._stack))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise DuplicateKeyError
    return made
