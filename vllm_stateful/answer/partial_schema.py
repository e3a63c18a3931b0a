# SPDX-License-Identifier: Apache-2.0
"""Checks a JSON document whose end has not arrived yet against a JSON Schema.

An objection holds for every way in which the document may go on. Of an array or object that is
still open, only the members that are there and the upper limits are judged. Keywords that are not
supported (``not``, ``if``, ``pattern``, ``format``, ``contains``, ``unevaluatedProperties`` and
others) count as fulfilled, and ``oneOf`` is treated as ``anyOf``. So a document with an objection
is invalid, but a document without one may still be invalid.

This is not a full validator, on purpose. Schemas come from clients, and the process that serves all
clients must not run their regular expressions, fetch their ``$ref``, or follow a schema whose
branches multiply. A schema is compiled once, within a bound (``compiled_schema``). Judging takes
``Steps``: everything that is done per value, member, branch and character is counted. An objection
is put into words once, at the end. ``objection`` is recursive; call it through ``with_room``.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from vllm_stateful.answer.compiled_schema import ANY, NEVER, CompiledSchema, Node, SchemaError

MAX_STEPS = 6_000
"""Steps of one judgement. A step takes at most about 1 us on a slow core, mostly half of that."""


class Objection(NamedTuple):
    """Why a document is invalid."""

    path: str
    """The path of the value: ``.count``, ``.items[2].name``; empty for the document itself."""
    problem: str

    def __str__(self) -> str:
        return f"{self.path.lstrip('.')}: {self.problem}" if self.path else self.problem


class Steps:
    """A budget of steps.

    Args:
        limit: the number of steps that may be taken.
    """

    __slots__ = ("left", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.left = limit

    @property
    def used(self) -> int:
        """The number of steps taken, at most ``limit``."""
        return self.limit - max(0, self.left)

    def take(self, num: int) -> None:
        """Take ``num`` steps from the budget. Call this before the work is done.

        Raises:
            SchemaError: fewer steps are left.
        """
        self.left -= num
        if self.left < 0:
            raise SchemaError("it takes too long")


def objection(
    schema: CompiledSchema, document: Any, num_open: int = 0, steps: Steps | None = None
) -> Objection | None:
    """Check a document against a schema.

    Args:
        schema: the compiled schema.
        document: the document, as parsed JSON.
        num_open: the number of containers that may still grow: the document itself, its last
            member, and so on. 0 for a complete document.
        steps: the budget to use; by default a new one of ``MAX_STEPS``.

    Returns:
        Why the document is invalid; None when nothing is known to be wrong with it.

    Raises:
        SchemaError: the schema is broken or recursive, or judging takes too many steps.
    """
    try:
        found = _Judge(steps or Steps(MAX_STEPS)).judge(schema.root, document, num_open, None)
    except RecursionError:
        raise SchemaError("it is too deep, or its $ref goes in a circle") from None
    return None if found is None else found.said()


_Path = tuple[Any, str | int] | None
"""The path of the container, and the key or index in it; None for the document itself."""


class _Found(NamedTuple):
    """An objection that is not put into words yet."""

    path: _Path
    form: str
    """A format string: {0} is the value, {1} is what the value is compared with."""
    value: Any = None
    other: object = None

    def said(self) -> Objection:
        parts = []
        path = self.path
        while path is not None:
            path, key = path
            parts.append(f"[{key}]" if isinstance(key, int) else f".{key}")
        problem = self.form.format(_shown(self.value), self.other)
        return Objection("".join(reversed(parts)), problem)


class _Judge:
    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def judge(self, node: Node, value: Any, num_open: int, path: _Path) -> _Found | None:
        steps = self._steps
        steps.left -= 1
        if steps.left < 0:
            raise SchemaError("it takes too long")
        while (target := node.target) is not None:
            steps.take(1)
            node = target
        if node.is_any:
            return None
        if node is NEVER:
            return _Found(path, "is not allowed")
        if node.fault is not None:
            raise SchemaError(node.fault)
        if value is None and node.is_nullable:
            return None
        found = self._scalar(node, value, num_open, path)
        if found is not None:
            return found
        if node.all_of or node.any_of:
            found = self._branches(node, value, num_open, path)
            if found is not None:
                return found
        if type(value) is dict:
            return self._properties(node, value, num_open, path)
        if type(value) is list:
            return self._items(node, value, num_open, path)
        return None

    def _scalar(self, node: Node, value: Any, num_open: int, path: _Path) -> _Found | None:
        """Judge the value itself, without its members."""
        kind = type(value)
        if (
            node.classes is not None
            and kind not in node.classes
            and not (node.is_integer and kind is float and value.is_integer())
        ):
            return _Found(path, "{0} is not of type {1}", value, node.names)
        if node.const is not None and not self._may_equal(value, node.const[0], num_open):
            return _Found(path, "{0} is not {1}", value, _Value(node.const[0]))
        if node.enum is not None and not self._is_allowed(node, value, num_open):
            return _Found(path, "{0} is not one of the allowed values", value)
        for limit in node.limits:
            if kind not in limit.classes or (limit.is_only_at_end and num_open):
                continue
            self._steps.take(1)
            measured = value if limit.measure is None else limit.measure(value)
            if not limit.holds(measured, limit.limit):
                return _Found(path, "{0} does not keep to {1}", value, limit)
        return None

    def _is_allowed(self, node: Node, value: Any, num_open: int) -> bool:
        if type(value) is str:
            self._steps.take(1 + (len(value) >> 10))
            return value in node.texts
        return any(self._may_equal(value, one, num_open) for one in node.enum or ())

    def _may_equal(self, value: Any, other: Any, num_open: int) -> bool:
        """Whether two values are equal as JSON, or may become so while ``value`` is open.

        1 and 1.0 are equal; 1 and true are not.
        """
        if num_open and isinstance(value, dict | list):
            self._steps.take(1)
            return isinstance(other, type(value))
        todo = [(value, other)]
        while todo:
            self._steps.take(1)
            value, other = todo.pop()
            if type(value) is dict and type(other) is dict:
                self._steps.take(2 + len(value))
                if value.keys() != other.keys():
                    return False
                todo.extend([(value[key], other[key]) for key in value])
            elif type(value) is list and type(other) is list:
                if len(value) != len(other):
                    return False
                self._steps.take(len(value) >> 2)
                todo.extend(zip(value, other, strict=True))
            elif not self._is_same(value, other):
                return False
        return True

    def _is_same(self, value: Any, other: Any) -> bool:
        """Whether two values are equal that are not both lists or both objects."""
        if type(value) is bool or type(other) is bool:
            return value is other
        if type(value) is str:
            self._steps.take(len(value) >> 10)
        return bool(value == other)

    def _branches(self, node: Node, value: Any, num_open: int, path: _Path) -> _Found | None:
        for branch in node.all_of:
            found = self.judge(branch, value, num_open, path)
            if found is not None:
                return found
        for branches in node.any_of:
            self._steps.take(len(branches))
            against = []
            for branch in branches:
                found = self.judge(branch, value, num_open, path)
                if found is not None:
                    against.append(found)
            if len(against) == len(branches):
                return self._deepest(against)
        return None

    def _deepest(self, found: list[_Found]) -> _Found:
        """The objection with the longest path. Its branch is mostly the one that was meant."""
        return found[0] if len(found) == 1 else max(found, key=lambda one: self._length(one.path))

    def _length(self, path: _Path) -> int:
        """The number of characters of a path in words."""
        length = 0
        while path is not None:
            self._steps.take(1)
            path, key = path
            length += len(str(key)) + 2 if isinstance(key, int) else len(key) + 1
        return length

    def _properties(
        self, node: Node, value: dict[str, Any], num_open: int, path: _Path
    ) -> _Found | None:
        known, other = node.known, node.other
        if known or other is not ANY:
            last = len(value) - 1
            for place, (key, member) in enumerate(value.items()):
                still_open = num_open - 1 if num_open and place == last else 0
                child = known.get(key, other)
                if child is NEVER and key not in known:
                    return _Found((path, key), "is no property of this object")
                found = self.judge(child, member, still_open, (path, key))
                if found is not None:
                    return found
        if num_open:
            return None
        self._steps.take(len(node.required) >> 2)
        for key in node.required:
            if key not in value:
                return _Found(path, "{0} is missing", key)
        return None

    def _items(self, node: Node, value: list[Any], num_open: int, path: _Path) -> _Found | None:
        first, rest = node.first, node.rest
        last = len(value) - 1
        for place, member in enumerate(value[: len(first)] if rest is ANY else value):
            item = first[place] if place < len(first) else rest
            still_open = num_open - 1 if num_open and place == last else 0
            found = self.judge(item, member, still_open, (path, place))
            if found is not None:
                return found
        return None


class _Value:
    """A value from the schema that is put into words only when needed."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __str__(self) -> str:
        return _shown(self._value)


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "the object" if isinstance(value, dict) else "the list"
    text = json.dumps(value[:61] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:57] + "..."
