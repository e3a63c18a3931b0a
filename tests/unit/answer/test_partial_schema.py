# SPDX-License-Identifier: Apache-2.0
"""What a schema may cost: to compile, and to judge by."""

import json
from typing import Any

import pytest

from vllm_stateful.answer.compiled_schema import (
    MAX_REF,
    MAX_UNITS,
    PAUSE_AFTER,
    SchemaError,
    compile_schema,
)
from vllm_stateful.answer.partial_schema import MAX_STEPS, Steps, objection


def doubled(key: str, leaf: Any, member: str = "") -> Any:
    """Twenty-four definitions, each of which means the next one twice."""
    defs: dict[str, Any] = {"24": leaf}
    for level in range(24):
        ref: Any = {"$ref": f"#/$defs/{level + 1}"}
        defs[str(level)] = {key: [{member: ref} if member else ref] * 2}
    return {"$defs": defs, "$ref": "#/$defs/0"}


@pytest.mark.parametrize(
    ("schema", "document"),
    [
        (doubled("allOf", {"type": "string"}), "x"),
        (doubled("anyOf", {"type": "string"}), "x"),
        (doubled("oneOf", {"type": "integer"}), "x"),
        (doubled("anyOf", {"type": "string"}, "items"), json.loads("[" * 25 + "]" * 25)),
        ({"$ref": "#"}, {}),
        (
            {
                "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
                "$ref": "#/$defs/a",
            },
            1,
        ),
        ({"items": {"enum": [*range(1000)]}}, [999] * 7),
        ({"items": {"const": [*range(1000)]}}, [[*range(1000)]] * 7),
        ({"items": {"allOf": [{"const": "x" * 100_000}] * 8}}, ["x" * 100_000] * 9),
        ({"items": {"anyOf": [{"enum": ["y" * 99]}] * 16}}, ["x" * 500_000]),
        ({"items": {"minLength": 1, "maxLength": 2}}, ["x"] * (MAX_STEPS // 3 + 1)),
        ({"items": {"required": ["a"] * 1000}}, [{"a": 1}] * 24),
        ({"properties": {"a": {"type": "integer"}}}, {str(i): 1 for i in range(MAX_STEPS)}),
    ],
)
def test_everything_that_takes_time_is_counted(schema: Any, document: Any) -> None:
    compiled, steps = compile_schema(schema), Steps(MAX_STEPS)
    with pytest.raises(SchemaError):
        objection(compiled, document, 0, steps)
    assert steps.used == MAX_STEPS


MANY = MAX_UNITS + 1


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [""] * MANY},
        {"required": ["a"] * MANY},
        {"type": ["object"] * MANY},
        {"properties": dict.fromkeys(map(str, range(MANY)), True)},
        {"anyOf": [True] * MANY},
        {"prefixItems": [True] * MANY},
        {"items": [True] * MANY},
        {"enum": ["x" * 1024 * MANY]},
        {"allOf": [{"$ref": "#/" + "a/" * 500 + str(i)} for i in range(40)]},
    ],
)
def test_a_schema_that_is_too_large_is_not_compiled(schema: Any) -> None:
    with pytest.raises(SchemaError, match="too large"):
        compile_schema(schema)


def test_what_no_keyword_reads_costs_nothing() -> None:
    schema = {"properties": {"a": {"type": "string", "pattern": "x"}}, "required": ["a"]}
    more = {
        "description": "x" * 9999,
        "examples": [{}] * MANY,
        "$defs": {"a": {"enum": [1] * MANY}},
    }
    assert compile_schema({**schema, **more}).units == compile_schema(schema).units


def test_a_reference_is_resolved_once() -> None:
    deep = "#/$defs/" + "/".join(["a"] * 100)
    one, two = (
        {"$defs": {}, "allOf": [{"$ref": "#/allOf"}, *[{"$ref": deep}] * n]} for n in (1, 2)
    )
    for schema in (one, two):
        inner: Any = {"type": "string"}
        for _ in range(100):
            inner = {"a": inner}
        schema["$defs"] = inner
    more = [{"$ref": deep} for _ in range(50)]
    few = compile_schema(one).units
    assert compile_schema({**one, "allOf": [*one["allOf"], *more]}).units == few + 2 * len(more)


def test_a_long_reference_is_not_followed() -> None:
    schema = {"properties": {"a": {"$ref": "#/$defs/" + "a" * MAX_REF}, "b": {"type": "integer"}}}
    compiled = compile_schema(schema)
    assert objection(compiled, {"b": "x"}) is not None, "it matters only where it is judged"
    with pytest.raises(SchemaError):
        objection(compiled, {"a": 1})


def test_other_threads_get_their_turn() -> None:
    pauses: list[int] = []
    schema = {"properties": {str(i): {"type": "string"} for i in range(1000)}}
    compiled = compile_schema(schema, pause=lambda: pauses.append(1))
    assert len(pauses) > compiled.units // (4 * PAUSE_AFTER)


@pytest.mark.parametrize(
    ("schema", "document", "said"),
    [
        ({"const": "y" * 99}, "x" * 99, f'"{"x" * 56}... is not "{"y" * 56}...'),
        ({"maximum": 3}, 4, "4 does not keep to maximum 3"),
        ({"items": {"properties": {"a": False}}}, [1, {"a": {}}], "[1].a: is not allowed"),
        ({"type": ["null", "integer", "null"]}, 1.5, "1.5 is not of type null or integer"),
        (
            {"anyOf": [{"type": "integer"}, {"items": {"const": {}}}]},
            [2],
            "[0]: 2 is not the object",
        ),
    ],
)
def test_what_is_said(schema: Any, document: Any, said: str) -> None:
    assert str(objection(compile_schema(schema), document)) == said
