# SPDX-License-Identifier: Apache-2.0
"""What one request may cost: all looks at all of its answers."""

import json
from concurrent.futures import Future
from typing import Any

import pytest

from vllm_stateful.answer import tool_call_stream
from vllm_stateful.answer.compiled_schema import CompiledSchema, SchemaError, compile_schema
from vllm_stateful.answer.partial_schema import Steps
from vllm_stateful.answer.tool_call_stream import Form, ToolCallStream
from vllm_stateful.answer.tool_schemas import (
    INLINE_UNITS,
    LOOK_STEPS,
    MAX_STEPS,
    STEPS_PER_CHAR,
    ToolSchemas,
)

LARGE = {"properties": {f"p{place}": {"type": "integer"} for place in range(INLINE_UNITS)}}


class Recorded(ToolSchemas):
    """Remembers what each look used."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.spent: list[int] = []

    def spend(self, steps: Steps) -> None:
        self.spent.append(steps.used)
        super().spend(steps)


def answer(schemas: ToolSchemas, strict: bool = True) -> ToolCallStream:
    return ToolCallStream(Form.HERMES, {}, None, strict=strict, schemas=schemas)


def call(arguments: Any, name: str = "tool") -> str:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return f'<tool_call>{{"name": "{name}", "arguments": {text}}}</tool_call>\n'


def feed(calls: ToolCallStream, text: str, before: str = "") -> Any:
    """Token by token."""
    found = None
    for end in range(4, len(text) + 4, 4):
        found = found or calls.look(before + text[:end])
    return found


def doubled() -> Any:
    """2 KB that take 2^24 steps."""
    defs: dict[str, Any] = {"24": {"type": "string"}}
    for level in range(24):
        defs[str(level)] = {"allOf": [{"$ref": f"#/$defs/{level + 1}"}] * 2}
    return {"$defs": defs, "additionalProperties": {"$ref": "#/$defs/0"}}


def test_what_cannot_be_judged_is_judged_once_for_all_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[Any] = []
    stock = tool_call_stream.objection

    def counted(schema: Any, document: Any, *others: Any) -> Any:
        looks.append(document)
        return stock(schema, document, *others)

    monkeypatch.setattr(tool_call_stream, "objection", counted)
    schemas = Recorded({"tool": doubled(), "other": {}})
    answers = [answer(schemas) for _ in range(3)]
    text = call({"a": "x", "b": ["y"] * 200}) + call({"a": "x"})
    for one in answers:
        assert feed(one, text + call({}, "other")) is None
        assert one.unchecked == {"schema": 2}
        assert one.results == {"valid": 1}
    judged = [document for document in looks if document]
    assert judged == [{"a": "x"}]
    assert max(schemas.spent) == LOOK_STEPS


@pytest.mark.parametrize(
    "arguments",
    [
        "[" + "1," * 60_000 + "1]",
        "[" + '{"a":{}},' * 20_000 + "1]",
        "[" + "[]," * 40_000 + "1]",
        '{"a": "' + "\\n" * 60_000 + '"}',
        "[" + ("1" * 4000 + ",") * 30 + "1]",
        "[" * 60_000,
    ],
)
@pytest.mark.parametrize("num", [1, 8])
def test_what_is_spent_grows_with_the_text_alone(arguments: str, num: int) -> None:
    schemas = Recorded({"tool": {"items": {"items": True}}})
    text = call(arguments)
    answers = [answer(schemas) for _ in range(num)]
    for end in range(40, len(text) + 40, 40):
        before = len(schemas.spent)
        for one in answers:
            one.look(text[:end])
        assert sum(schemas.spent[before:]) <= MAX_STEPS + STEPS_PER_CHAR * 40 * num
    assert sum(schemas.spent) <= MAX_STEPS + STEPS_PER_CHAR * len(text) * num
    assert max(schemas.spent) <= LOOK_STEPS


def test_ordinary_calls_are_all_checked() -> None:
    line = {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string"}}}
    schema = {"properties": {"lines": {"items": line}, "path": {"type": "string"}}}
    arguments = {"path": "a/b", "lines": [{"n": n, "s": "some words\n"} for n in range(100)]}
    calls = answer(ToolSchemas({"tool": schema}))
    assert feed(calls, call(arguments) * 30) is None
    assert calls.results == {"valid": 30}
    assert not calls.unchecked


def test_a_long_text_in_a_call_is_checked() -> None:
    code = "for (int i = 0; i < n; i++) { a[i] = b[i, 1]; }\n" * 4000
    calls = answer(ToolSchemas({"tool": {"properties": {"code": {"type": "string"}}}}))
    assert feed(calls, call({"code": code})) is None
    assert calls.results == {"valid": 1}


@pytest.mark.parametrize("strict", [True, False])
def test_a_large_schema_is_judged_by_when_it_is_compiled(strict: bool) -> None:
    future: Future[CompiledSchema] = Future()
    asked: list[Any] = []

    def submit(schema: Any) -> Future[CompiledSchema]:
        asked.append(schema)
        return future

    calls = answer(ToolSchemas({"tool": LARGE}, submit), strict)
    text = call({"p1": "x"})
    assert feed(calls, text) is None
    assert calls.unchecked == {"schema": 1}, "it was not compiled when the call ended"
    future.set_result(compile_schema(LARGE))
    found = feed(calls, text, before=text)
    assert calls.results == {"invalid": 1}
    assert (found is not None) == strict
    assert asked == [LARGE]


def test_in_the_middle_of_a_call_the_looks_begin_when_it_is_compiled() -> None:
    future: Future[CompiledSchema] = Future()
    calls = answer(ToolSchemas({"tool": LARGE}, lambda _: future))
    text = call({"p1": "x", "q": [1, 2, 3]})
    end = text.index('"q"')
    assert feed(calls, text[:end]) is None
    future.set_result(compile_schema(LARGE))
    found = feed(calls, text[end:], before=text[:end])
    assert found.end < len(text) - 20
    assert calls.results == {"invalid": 1}


def test_a_schema_that_cannot_be_compiled_is_asked_for_once() -> None:
    for how in ("full", "failed"):
        future: Future[CompiledSchema] = Future()
        future.set_exception(SchemaError("it is too large"))
        asked: list[Any] = []

        def submit(
            schema: Any,
            asked: list[Any] = asked,
            begun: Any = future if how == "failed" else None,
        ) -> Any:
            asked.append(schema)
            return begun

        calls = answer(ToolSchemas({"tool": LARGE}, submit))
        feed(calls, call({"p1": "x"}) * 2)
        assert calls.unchecked == {"schema": 2}
        assert len(asked) == 1
