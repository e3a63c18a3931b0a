# SPDX-License-Identifier: Apache-2.0
"""What speaks against a JSON document, by a JSON Schema, when its end is not there yet.

Everything that is said holds for every way in which the document may go on: of an array or object
that is still open only its members are judged, and what it has too many of. Keywords that are not
known here (``not``, ``if``, ``pattern``, ``format``, ``contains``, ``unevaluatedProperties`` and
others) are taken as fulfilled, ``oneOf`` as ``anyOf``. So a document against which nothing is said
may still be invalid, and one against which something is said is invalid.

This is no full validator on purpose. Schemas come from clients, and the process that serves all of
them must not run their regular expressions, fetch their ``$ref``, or follow a schema whose branches
multiply: the work is bounded by ``MAX_STEPS``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import unquote

MAX_STEPS = 20_000
"""Pairs of a value and a schema that are looked at, about 20 ms."""


class SchemaError(ValueError):
    """The schema is broken, refers to what is not in it, or takes too long to follow."""


class Objection(NamedTuple):
    """Why a document is invalid."""

    path: str
    """Of the value: ``.count``, ``.items[2].name``; empty for the document itself."""
    problem: str

    def __str__(self) -> str:
        return f"{self.path.lstrip('.')}: {self.problem}" if self.path else self.problem


def objection(schema: Any, document: Any, num_open: int = 0) -> Objection | None:
    """What speaks against a document; None when nothing is known to.

    Args:
        schema: a JSON Schema, parsed; of any draft.
        document: parsed JSON.
        num_open: how many containers may still grow: the document itself, the last member in
            it, and so on. 0 for a complete document.

    Raises:
        SchemaError: see there.
    """
    try:
        return _Judge(schema).judge(schema, document, num_open, "")
    except RecursionError:
        raise SchemaError("it is too deep, or its $ref goes in a circle") from None


class _Judge:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._steps = 0

    def judge(self, schema: Any, value: Any, num_open: int, path: str) -> Objection | None:
        self._count(1)
        if isinstance(schema, bool):
            return None if schema else Objection(path, "is not allowed")
        if not isinstance(schema, dict):
            raise SchemaError("a schema is no object")
        if "$ref" in schema:
            return self._referred(schema["$ref"], value, num_open, path)
        if "$id" in schema and schema is not self._root:
            return None
        if value is None and schema.get("nullable") is True:
            return None
        self._count(sum(_length(schema.get(key)) for key in ("type", "enum", "required")))
        problem = _scalar_problem(schema, value, num_open)
        if problem is not None:
            return Objection(path, problem)
        return self._branches(schema, value, num_open, path) or self._members(
            schema, value, num_open, path
        )

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise SchemaError("it takes too long")

    def _referred(self, ref: Any, value: Any, num_open: int, path: str) -> Objection | None:
        if not isinstance(ref, str) or not ref.startswith("#"):
            raise SchemaError(f"$ref {ref!r} is not in the schema")
        found = self._root
        for part in ref[1:].split("/")[1:] if ref.startswith("#/") else ():
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
                found = found[int(key)]
            elif isinstance(found, dict) and key in found:
                found = found[key]
            else:
                raise SchemaError(f"$ref {ref!r} is not in the schema")
        if ref != "#" and not ref.startswith("#/"):
            return None  # an anchor
        return self.judge(found, value, num_open, path)

    def _branches(
        self, schema: dict[str, Any], value: Any, num_open: int, path: str
    ) -> Objection | None:
        for branch in _list(schema, "allOf"):
            if found := self.judge(branch, value, num_open, path):
                return found
        for key in ("anyOf", "oneOf"):
            branches = _list(schema, key)
            results = [self.judge(branch, value, num_open, path) for branch in branches]
            against = [one for one in results if one is not None]
            if results and len(against) == len(results):
                return _deepest(against)
        return None

    def _members(
        self, schema: dict[str, Any], value: Any, num_open: int, path: str
    ) -> Objection | None:
        if isinstance(value, dict):
            return self._properties(schema, value, num_open, path)
        if isinstance(value, list):
            return self._items(schema, value, num_open, path)
        return None

    def _properties(
        self, schema: dict[str, Any], value: dict[str, Any], num_open: int, path: str
    ) -> Objection | None:
        known = _dict(schema, "properties")
        other = True if "patternProperties" in schema else schema.get("additionalProperties", True)
        for place, (key, member) in enumerate(value.items()):
            still_open = max(0, num_open - 1) if place == len(value) - 1 else 0
            if key not in known and other is False:
                return Objection(f"{path}.{key}", "is no property of this object")
            if found := self.judge(known.get(key, other), member, still_open, f"{path}.{key}"):
                return found
        if num_open:
            return None
        for key in _list(schema, "required"):
            if not isinstance(key, str):
                raise SchemaError("required is no list of names")
            if key not in value:
                return Objection(path, f"{_shown(key)} is missing")
        return None

    def _items(
        self, schema: dict[str, Any], value: list[Any], num_open: int, path: str
    ) -> Objection | None:
        items = schema.get("items", True)
        first = items if isinstance(items, list) else _list(schema, "prefixItems")
        rest = True if isinstance(items, list) else items
        for place, member in enumerate(value):
            still_open = max(0, num_open - 1) if place == len(value) - 1 else 0
            item = first[place] if place < len(first) else rest
            if item is True:
                continue
            if found := self.judge(item, member, still_open, f"{path}[{place}]"):
                return found
        return None


def _deepest(found: list[Objection]) -> Objection:
    """Of all branches the one that went furthest: mostly the one that was meant."""
    return found[0] if len(found) == 1 else max(found, key=lambda one: len(one.path))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


def _list(schema: dict[str, Any], key: str) -> list[Any]:
    found = schema.get(key, [])
    if not isinstance(found, list):
        if key == "required":
            return []  # a flag of draft 3, and of schemas made by hand
        raise SchemaError(f"{key} is no list")
    return found


def _dict(schema: dict[str, Any], key: str) -> dict[str, Any]:
    found = schema.get(key, {})
    if not isinstance(found, dict):
        raise SchemaError(f"{key} is no object")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": _is_number,
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
}

_LIMITS: dict[str, tuple[Callable[[Any, Any], bool], Callable[[Any], bool], Any, bool]] = {
    "minimum": (lambda a, b: a >= b, _is_number, None, False),
    "maximum": (lambda a, b: a <= b, _is_number, None, False),
    "exclusiveMinimum": (lambda a, b: a > b, _is_number, None, False),
    "exclusiveMaximum": (lambda a, b: a < b, _is_number, None, False),
    "minLength": (lambda a, b: a >= b, lambda value: isinstance(value, str), len, False),
    "maxLength": (lambda a, b: a <= b, lambda value: isinstance(value, str), len, False),
    "maxItems": (lambda a, b: a <= b, lambda value: isinstance(value, list), len, False),
    "minItems": (lambda a, b: a >= b, lambda value: isinstance(value, list), len, True),
    "maxProperties": (lambda a, b: a <= b, lambda value: isinstance(value, dict), len, False),
    "minProperties": (lambda a, b: a >= b, lambda value: isinstance(value, dict), len, True),
}
"""Keyword: what must hold, of which values, by which measure, and whether only at the end."""


def _scalar_problem(schema: dict[str, Any], value: Any, num_open: int) -> str | None:
    """What is wrong with the value itself, its members left out."""
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not all(isinstance(name, str) and name in _TYPES for name in names):
            raise SchemaError(f"type {schema['type']!r} is unknown")
        if not any(_TYPES[name](value) for name in names):
            return f"{_shown(value)} is not of type {' or '.join(names)}"
    allowed = _list(schema, "enum") if "enum" in schema else None
    if "const" in schema and not _may_equal(value, schema["const"], num_open):
        return f"{_shown(value)} is not {_shown(schema['const'])}"
    if allowed is not None and not any(_may_equal(value, one, num_open) for one in allowed):
        return f"{_shown(value)} is not one of the allowed values"
    for keyword, (holds, applies, measure, only_at_end) in _LIMITS.items():
        limit = schema.get(keyword)
        if not _is_number(limit) or not applies(value) or (only_at_end and num_open):
            continue
        if not holds(value if measure is None else measure(value), limit):
            return f"{_shown(value)} does not keep to {keyword} {limit}"
    return None


def _may_equal(value: Any, other: Any, num_open: int) -> bool:
    """Equality of JSON: 1 and 1.0 are equal, 1 and true are not."""
    if num_open and isinstance(value, dict | list):
        return isinstance(other, type(value))
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(
            _may_equal(one, another, 0) for one, another in zip(value, other, strict=True)
        )
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(
            _may_equal(value[key], other[key], 0) for key in value
        )
    return bool(value == other)


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "the object" if isinstance(value, dict) else "the list"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
