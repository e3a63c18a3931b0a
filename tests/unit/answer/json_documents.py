# SPDX-License-Identifier: Apache-2.0
"""Random JSON Schemas, documents of them, and ways to write a document down."""

import json
import math
from typing import Any

from hypothesis import strategies as st

KEYS = ["a", "b", "c", "long key", 'q"uote']
TEXTS = st.text(alphabet='ab{}[],:"\\ é\n', max_size=6)
SPACES = st.sampled_from(["", "", " ", "\n  ", "\t"])

scalar_schemas: st.SearchStrategy[Any] = st.one_of(
    st.just({"type": "string"}),
    st.just({"type": "string", "minLength": 1, "maxLength": 4}),
    st.just({"type": "integer", "minimum": -5, "maximum": 12}),
    st.just({"type": "number", "exclusiveMinimum": -2.5}),
    st.just({"type": "boolean"}),
    st.just({"type": ["null", "string"]}),
    st.just({"enum": ["red", 1, None, True, [1, 2], {"a": 1}]}),
    st.just({"const": 12}),
    st.just({"$ref": "#/$defs/code"}),
)
DEFS = {"code": {"type": "integer", "enum": [1, 12, 123]}}


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def build(properties: dict[str, Any], num: int, other: Any) -> dict[str, Any]:
        made: dict[str, Any] = {"type": "object", "properties": properties}
        made["required"] = sorted(properties)[:num]
        return made if other is None else {**made, "additionalProperties": other}

    others = st.one_of(st.none(), st.just(False), inner)
    properties = st.dictionaries(st.sampled_from(KEYS[:4]), inner, max_size=3)
    return st.builds(build, properties, st.integers(0, 2), others)


def _arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    sizes = st.sampled_from([{}, {"maxItems": 3}, {"minItems": 1}])
    plain = st.builds(lambda item, size: {"type": "array", "items": item, **size}, inner, sizes)
    tuples = st.builds(
        lambda first, rest: {"type": "array", "prefixItems": first, "items": rest},
        st.lists(inner, min_size=1, max_size=2),
        st.one_of(st.just(False), inner),
    )
    return plain | tuples


def _combined(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    either = st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner)
    both = st.builds(lambda one: {"allOf": [one, True]}, inner)
    return either | both


schemas: st.SearchStrategy[Any] = st.recursive(
    scalar_schemas, lambda inner: _objects(inner) | _arrays(inner) | _combined(inner), max_leaves=6
)
tools: st.SearchStrategy[Any] = _objects(schemas).map(lambda schema: {**schema, "$defs": DEFS})

anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-20, 200) | st.floats(-9, 9) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=5,
)


def documents(schema: Any) -> st.SearchStrategy[Any]:
    """Documents that are made to be valid; mostly they are."""
    if isinstance(schema, bool):
        return anything if schema else st.nothing()
    if "$ref" in schema:
        return documents(DEFS["code"])
    for key in ("anyOf", "allOf"):
        if key in schema:
            return st.one_of([documents(one) for one in schema[key] if one is not True])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    return _documents_of_type(schema)


def _documents_of_type(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    match schema["type"]:
        case "object":
            return _members(schema)
        case "array":
            first = [documents(one) for one in schema.get("prefixItems", [])]
            if schema["items"] is False:
                return st.tuples(*first).map(list)
            rest = st.lists(
                documents(schema["items"]),
                min_size=schema.get("minItems", 0),
                max_size=schema.get("maxItems", 3),
            )
            return st.builds(lambda head, tail: [*head, *tail], st.tuples(*first), rest)
        case "string":
            return st.text("ab{}[]:,é\n", min_size=schema.get("minLength", 0), max_size=4)
        case "integer":
            return st.integers(-5, 12)
        case "number":
            return st.floats(-2, 9).map(lambda number: round(number, 2))
        case "boolean":
            return st.booleans()
    return st.none() | TEXTS


def _members(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    known, required = schema["properties"], schema["required"]
    members = {key: documents(one) for key, one in known.items() if key in required}
    optional = {key: documents(one) for key, one in known.items() if key not in required}
    made = st.fixed_dictionaries(members, optional=optional)
    other = schema.get("additionalProperties", True)
    if other is False:
        return made
    more = st.dictionaries(st.just("q"), documents(other), max_size=1)
    return st.builds(lambda one, two: {**one, **two}, made, more)


@st.composite
def written(draw: st.DrawFn, value: Any) -> str:
    """The document as text, with any white space and any order of keys."""
    space = lambda: draw(SPACES)  # noqa: E731
    if isinstance(value, dict):
        pairs = draw(st.permutations(list(value.items())))
        members = [
            f"{space()}{draw(written(key))}{space()}:{space()}{draw(written(one))}{space()}"
            for key, one in pairs
        ]
        return "{" + (",".join(members) or space()) + "}"
    if isinstance(value, list):
        items = [f"{space()}{draw(written(one))}{space()}" for one in value]
        return "[" + (",".join(items) or space()) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "0"
    return json.dumps(value, ensure_ascii=draw(st.booleans()))
