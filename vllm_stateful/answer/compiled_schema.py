# SPDX-License-Identifier: Apache-2.0
"""Compiles JSON Schemas of clients, within a bound: every ``$ref`` is resolved.

Parts that ``partial_schema`` does not use (a description, an unused definition) cost nothing. A
broken part raises an error only when a value is judged by it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import unquote

MAX_UNITS = 16_384
"""Units that compiling a schema may take. A unit takes at most about 3 us."""

MAX_REF = 1024
"""The most characters of a ``$ref``; a longer one counts as broken."""

PAUSE_AFTER = 64
"""Units between two calls of ``pause``."""


class SchemaError(ValueError):
    """The schema is broken, refers to something outside it, or takes too long to follow."""


class CompiledSchema(NamedTuple):
    """A schema whose references are resolved."""

    root: Node
    units: int
    """The units that compiling took."""


def compile_schema(
    schema: Any, max_units: int = MAX_UNITS, pause: Callable[[], None] | None = None
) -> CompiledSchema:
    """Resolve the references of a schema. Broken parts are kept as nodes with a ``fault``.

    Args:
        schema: a parsed JSON Schema of any draft. It must not change afterwards.
        max_units: see ``MAX_UNITS``.
        pause: called every ``PAUSE_AFTER`` units, to let other threads run.

    Raises:
        SchemaError: the schema is too large.
    """
    compiler = _Compiler(schema, max_units, pause)
    root = compiler.compile()
    return CompiledSchema(root, compiler.units)


class Limit(NamedTuple):
    keyword: str
    holds: Callable[[Any, Any], bool]
    classes: frozenset[type]
    measure: Callable[[Any], int] | None
    is_only_at_end: bool
    limit: float

    def __str__(self) -> str:
        return f"{self.keyword} {self.limit}"


class Node:
    """One schema. Keywords that it does not have are None or empty."""

    __slots__ = (
        "all_of",
        "any_of",
        "classes",
        "const",
        "enum",
        "fault",
        "first",
        "is_any",
        "is_integer",
        "is_nullable",
        "known",
        "limits",
        "names",
        "other",
        "required",
        "rest",
        "target",
        "texts",
    )

    def __init__(self) -> None:
        self.fault: str | None = None
        """Why no value can be judged by it; None when values can."""
        self.is_any = False
        """Whether it allows every value."""
        self.target: Node | None = None
        """The schema that its ``$ref`` names. All other keywords are ignored then."""
        self.is_nullable = False
        self.classes: frozenset[type] | None = None
        """The Python types of the values that it allows."""
        self.is_integer = False
        """Whether a float without a fraction is allowed beside them."""
        self.names = ""
        """The JSON names of the types, for messages."""
        self.const: tuple[Any] | None = None
        self.enum: list[Any] | None = None
        """The allowed values that are not strings."""
        self.texts: frozenset[str] = frozenset()
        """The allowed values that are strings."""
        self.limits: tuple[Limit, ...] = ()
        self.all_of: tuple[Node, ...] = ()
        self.any_of: tuple[tuple[Node, ...], ...] = ()
        self.known: dict[str, Node] = {}
        """The schemas of properties, by name."""
        self.other: Node = ANY
        """The schema of all other properties."""
        self.required: tuple[str, ...] = ()
        self.first: tuple[Node, ...] = ()
        """The schemas of the first items, one each."""
        self.rest: Node = ANY
        """The schema of all items behind them."""


def _constant(fault: str | None = None) -> Node:
    made = Node.__new__(Node)
    for name in Node.__slots__:
        setattr(made, name, None)
    made.fault, made.is_any = fault, fault is None
    return made


ANY = _constant()
NEVER = _constant()
NEVER.is_any = False


class _BrokenError(Exception):
    """One node is broken; the others can still be used."""


class _Compiler:
    def __init__(self, root: Any, max_units: int, pause: Callable[[], None] | None) -> None:
        self.units = 0
        self._root = root
        self._max_units = max_units
        self._pause = pause
        self._pause_at = PAUSE_AFTER
        self._nodes: dict[int, Node] = {}
        """By the ``id`` of the schema, which lives as long as the root does."""
        self._refs: dict[str, Node] = {}
        self._todo: list[tuple[Node, dict[str, Any]]] = []

    def compile(self) -> Node:
        root = self._node(self._root)
        while self._todo:
            node, schema = self._todo.pop()
            self._spend(1)
            try:
                self._fill(node, schema)
            except _BrokenError as error:
                node.fault = str(error)
        return root

    def _spend(self, units: int) -> None:
        self.units += units
        if self.units > self._max_units:
            raise SchemaError("it is too large")
        if self._pause is not None and self.units >= self._pause_at:
            self._pause_at = self.units + PAUSE_AFTER
            self._pause()

    def _node(self, schema: Any) -> Node:
        """The node of a schema. A new node is filled later."""
        if schema is True:
            return ANY
        if schema is False:
            return NEVER
        if not isinstance(schema, dict):
            return _constant("a schema is no object")
        found = self._nodes.get(id(schema))
        if found is None:
            found = self._nodes[id(schema)] = Node()
            self._todo.append((found, schema))
        return found

    def _all(self, schemas: list[Any]) -> tuple[Node, ...]:
        self._spend(len(schemas))
        return tuple([self._node(one) for one in schemas])

    def _fill(self, node: Node, schema: dict[str, Any]) -> None:
        if "$ref" in schema:
            node.target = self._referred(schema["$ref"])
            return
        if "$id" in schema and schema is not self._root:
            node.is_any = True
            return
        node.is_nullable = schema.get("nullable") is True
        if "type" in schema:
            self._types(node, schema["type"])
        if "const" in schema:
            node.const = (schema["const"],)
        if "enum" in schema:
            self._enum(node, _list(schema, "enum"))
        node.limits = tuple(
            [
                Limit(keyword, *how, schema[keyword])
                for keyword, how in _LIMITS.items()
                if keyword in schema and type(schema[keyword]) in _NUMBER
            ]
        )
        self._spend(len(node.limits))
        node.all_of = self._all(_list(schema, "allOf"))
        both = [self._all(_list(schema, key)) for key in ("anyOf", "oneOf") if key in schema]
        node.any_of = tuple([branches for branches in both if branches])
        self._fill_members(node, schema)

    def _fill_members(self, node: Node, schema: dict[str, Any]) -> None:
        known = schema.get("properties", {})
        if not isinstance(known, dict):
            raise _BrokenError("properties is no object")
        self._spend(len(known))
        node.known = {key: self._node(one) for key, one in known.items()}
        if "patternProperties" not in schema:
            node.other = self._node(schema.get("additionalProperties", True))
        required = schema.get("required")
        if isinstance(required, list):  # in draft 3 and in handmade schemas it may be a flag
            self._spend(len(required))
            if not all(isinstance(key, str) for key in required):
                raise _BrokenError("required is no list of names")
            node.required = tuple(required)
        items = schema.get("items", True)
        is_tuple = isinstance(items, list)
        node.first = self._all(items if is_tuple else _list(schema, "prefixItems"))
        node.rest = ANY if is_tuple else self._node(items)

    def _types(self, node: Node, types: Any) -> None:
        names = types if isinstance(types, list) else [types]
        self._spend(len(names))
        if not all(isinstance(name, str) and name in _CLASSES for name in names):
            raise _BrokenError("a type is unknown")
        names = list(dict.fromkeys(names))
        node.names = " or ".join(names)
        node.classes = frozenset().union(*[_CLASSES[name] for name in names])
        node.is_integer = "integer" in names and float not in node.classes

    def _enum(self, node: Node, allowed: list[Any]) -> None:
        self._spend(len(allowed))
        texts = [one for one in allowed if isinstance(one, str)]
        self._spend(sum(map(len, texts)) >> 10)
        node.texts = frozenset(texts)
        node.enum = [one for one in allowed if not isinstance(one, str)]

    def _referred(self, ref: Any) -> Node:
        if not isinstance(ref, str) or not ref.startswith("#") or len(ref) > MAX_REF:
            raise _BrokenError("$ref is not in the schema")
        if ref == "#":
            return self._node(self._root)
        if not ref.startswith("#/"):
            return ANY  # an anchor, which is not resolved
        found = self._refs.get(ref)
        if found is None:
            found = self._refs[ref] = self._node(self._at(ref[2:]))
        return found

    def _at(self, pointer: str) -> Any:
        parts = pointer.split("/")
        self._spend(len(parts) + (len(pointer) >> 5))
        found = self._root
        for part in parts:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
                found = found[int(key)]
            elif isinstance(found, dict) and key in found:
                found = found[key]
            else:
                raise _BrokenError("$ref is not in the schema")
        return found


def _list(schema: dict[str, Any], key: str) -> list[Any]:
    found = schema.get(key, [])
    if not isinstance(found, list):
        raise _BrokenError(f"{key} is no list")
    return found


_NUMBER: frozenset[type] = frozenset({int, float})
_TEXT: frozenset[type] = frozenset({str})
_OBJECT: frozenset[type] = frozenset({dict})
_ARRAY: frozenset[type] = frozenset({list})

_CLASSES: dict[str, frozenset[type]] = {
    "object": _OBJECT,
    "array": _ARRAY,
    "string": _TEXT,
    "boolean": frozenset({bool}),
    "null": frozenset({type(None)}),
    "number": _NUMBER,
    "integer": frozenset({int}),
}

_LIMITS: dict[str, tuple[Callable[[Any, Any], bool], frozenset[type], Any, bool]] = {
    "minimum": (lambda a, b: a >= b, _NUMBER, None, False),
    "maximum": (lambda a, b: a <= b, _NUMBER, None, False),
    "exclusiveMinimum": (lambda a, b: a > b, _NUMBER, None, False),
    "exclusiveMaximum": (lambda a, b: a < b, _NUMBER, None, False),
    "minLength": (lambda a, b: a >= b, _TEXT, len, False),
    "maxLength": (lambda a, b: a <= b, _TEXT, len, False),
    "maxItems": (lambda a, b: a <= b, _ARRAY, len, False),
    "minItems": (lambda a, b: a >= b, _ARRAY, len, True),
    "maxProperties": (lambda a, b: a <= b, _OBJECT, len, False),
    "minProperties": (lambda a, b: a >= b, _OBJECT, len, True),
}
"""For each keyword: the relation of value and limit that must hold, the types that it applies to,
what is measured of the value (None for the value itself), and whether it applies only to complete
values."""
