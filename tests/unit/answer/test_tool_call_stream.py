# SPDX-License-Identifier: Apache-2.0
"""Calls in growing text: no valid one is ever objected to, and no invalid one for long."""

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from json_documents import anything, documents, schemas, tools, written

from vllm_stateful.answer.compiled_schema import SchemaError, compile_schema
from vllm_stateful.answer.json_scanner import JsonScanner
from vllm_stateful.answer.partial_schema import objection
from vllm_stateful.answer.tool_call_stream import COMPLETE, Form, ToolCallStream, Verdict

NUMBER = {
    "type": "object",
    "properties": {"count": {"type": "integer"}},
    "required": ["count"],
    "additionalProperties": False,
}
TOOLS = {"add": NUMBER, "say": {}}


def is_valid(schema: Any, document: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(document))


def stream(form: Form = Form.HERMES, limit: int | None = None, **options: Any) -> ToolCallStream:
    return ToolCallStream(form, options.pop("tools", TOOLS), limit, **{"strict": True, **options})


def feed(calls: ToolCallStream, text: str) -> tuple[int, Verdict] | None:
    """Letter by letter; how many it took to the verdict, and the verdict."""
    for end in range(1, len(text) + 1):
        if verdict := calls.look(text[:end]):
            return end, verdict
    return None


def call(arguments: str, name: str = "add", key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


# ---- against jsonschema ------------------------------------------------------------------------


@given(data=st.data(), schema=tools | schemas)
@settings(max_examples=200, deadline=None)
def test_on_complete_documents_it_says_what_jsonschema_says(data: Any, schema: Any) -> None:
    document = data.draw(documents(schema) | anything)
    schema = {**schema, "$defs": {"code": {"enum": [1, 12, 123]}}}
    found = objection(compile_schema(schema), document)
    expected = is_valid(schema, document)
    assert (found is None) == expected, found


def written_in(form: Form, arguments: str, order: bool) -> str:
    name, key = '"name" : "tool"', f'"{"parameters" if form is Form.LIST else "arguments"}"'
    both = [name, f"{key}: {arguments}"]
    body = "{" + ", ".join(both if order else both[::-1]) + "}"
    return {
        Form.HERMES: f"I will.\n<tool_call>\n{body}\n</tool_call>",
        Form.LLAMA: body,
        Form.MISTRAL: f"[TOOL_CALLS]tool[ARGS]{arguments}" if order else f"[TOOL_CALLS][{body}]",
        Form.LIST: f"[{body}]",
        Form.ARGUMENTS: arguments,
    }[form]


@given(data=st.data(), schema=tools, form=st.sampled_from(Form), order=st.booleans())
@settings(max_examples=200, deadline=None)
def test_no_prefix_of_a_valid_call_is_objected_to(
    data: Any, schema: Any, form: Form, order: bool
) -> None:
    document = data.draw(documents(schema).filter(lambda one: is_valid(schema, one)))
    text = written_in(form, data.draw(written(document)), order)
    calls = stream(form, limit=1, tools={"tool": schema}, name="tool")
    found = feed(calls, text)
    assert found is not None
    assert found == (len(text), Verdict(len(text), COMPLETE))
    assert calls.results == {"valid": 1}
    assert not calls.unchecked


@given(data=st.data(), schema=tools, form=st.sampled_from(Form), order=st.booleans())
@settings(max_examples=200, deadline=None)
def test_an_invalid_call_is_objected_to_at_its_end_at_the_latest(
    data: Any, schema: Any, form: Form, order: bool
) -> None:
    document = data.draw((anything | documents(schema)).filter(lambda one: isinstance(one, dict)))
    text = written_in(form, data.draw(written(document)), order)
    calls = stream(form, tools={"tool": schema}, name="tool")
    found = feed(calls, text)
    valid = is_valid(schema, document)
    assert (found is None) == valid
    assert calls.results == ({"valid": 1} if valid else {"invalid": 1})


@given(data=st.data(), schema=tools)
@settings(max_examples=200, deadline=None)
def test_a_bad_value_is_objected_to_at_its_end(data: Any, schema: Any) -> None:
    """A valid document, and one member more that is not what its schema says."""
    schema = {**schema, "properties": {**schema["properties"], "z": {"type": "boolean"}}}
    good = data.draw(documents(schema).filter(lambda one: is_valid(schema, one)))
    good.pop("z", None)
    bad = data.draw(anything.filter(lambda one: not isinstance(one, bool)))
    before = data.draw(written(good)).rstrip()[:-1] + (", " if good else "")
    text = f'[TOOL_CALLS]tool{before}"z": {data.draw(written(bad))}'
    calls = stream(Form.MISTRAL, tools={"tool": schema})
    found = feed(calls, text + ', "more": [1, 2, 3]}')
    assert found is not None
    assert found[0] <= len(text) + 1, "a number ends where something follows it"
    assert "arguments.z" in found[1].reason


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_cut_document_is_a_prefix_of_the_whole(data: Any) -> None:
    """What the scanner leaves is JSON wherever the text ends, however the text came."""
    document = data.draw(anything.filter(lambda one: isinstance(one, dict | list)))
    text = data.draw(written(document))
    scanner, end = JsonScanner(0), 0
    while end < len(text):
        end = min(len(text), end + data.draw(st.integers(1, 7)))
        scanner.scan(text[:end])
        if scanner.cut:
            scanner.document(text[:end])
    assert scanner.end == len(text)
    assert scanner.document(text) == json.loads(text)


# ---- one by one --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (call('{"count": "x"'), 'add: arguments.count: "x" is not of type integer'),
        (call('{"count": 1, "more": 2,'), "add: arguments.more: is no property of this object"),
        (call("{}"), 'add: arguments: "count" is missing'),
        (call("[", "add"), "add: arguments: the list is not of type object"),
        ('{"name": "sub"', 'there is no tool "sub"'),
        ('{"arguments": {"count": 1}}', "it has no name"),
        ('{"name": "say"}', "it has no arguments"),
        ('{"name": "add" "x",', "it is no JSON (Expecting ',' delimiter)"),
        ("[", "it is no JSON object"),
        ("not", "it is no JSON object"),
        ('{"name": "say", "arguments": {}]', "its brackets do not match"),
        (call("{}", "say") + "{", "text follows its JSON"),
        ('{"name": "say", </tool_call>', "it ends inside of the JSON"),
    ],
)
def test_what_is_wrong_and_when_it_is_known(text: str, reason: str) -> None:
    whole = "<tool_call>" + text
    calls = stream()
    found = feed(calls, whole + " " * 3)
    assert found is not None, calls.results
    assert found[1].reason == f"invalid_tool_call: {reason}"
    assert found[0] <= len(whole)
    assert found[1].end == found[0]
    assert calls.results == {"invalid": 1}


def test_without_strict_an_invalid_call_is_counted_and_goes_on() -> None:
    calls = stream(strict=False)
    bad, good = call('{"count": "x"}'), call('{"count": 1}')
    text = f"<tool_call>{bad}</tool_call>\n<tool_call>{good}</tool_call> and more"
    assert feed(calls, text) is None
    calls.finish()
    assert calls.results == {"invalid": 1, "valid": 1}


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_turn_ends_behind_the_last_allowed_call(limit: int) -> None:
    one = f"<tool_call>\n{call('{}', 'say')}\n</tool_call>"
    text = "Now: " + "\n".join([one] * 2)
    calls = stream(limit=limit)
    found = feed(calls, text + "\nDone.")
    if limit == 3:
        assert found is None
        return
    end = len("Now: " + "\n".join([one] * limit))
    assert found == (end, Verdict(end, COMPLETE))


def test_text_that_came_with_the_end_of_the_call_is_not_part_of_it() -> None:
    text = f"<tool_call>{call('{}', 'say')}</tool_call>\n\nAnd"
    assert stream(limit=1).look(text) == Verdict(text.index("\n"), COMPLETE)


def test_llama_calls_are_separated_by_semicolons_and_other_json_is_no_call() -> None:
    one = call("{}", "say", "parameters")
    calls = stream(Form.LLAMA, limit=2)
    assert feed(calls, f"<|python_tag|>{one}; {one}") is not None
    assert calls.results == {"valid": 2}
    for text in ('{"name": "Bob", "age": 3} is', '{"answer": 42}', f"See: {one}", f" {one}"):
        calls = stream(Form.LLAMA, limit=1)
        assert feed(calls, text) is None
        calls.finish()
        assert not calls.results


def test_both_forms_of_mistral() -> None:
    one = call('{"count": 1}')
    for text, num in (
        (f"[TOOL_CALLS][{one}, {one}]", 2),
        (f"[TOOL_CALLS]{one}", 1),
        ('[TOOL_CALLS]add{"count": 1}', 1),
        ('[TOOL_CALLS]add[CALL_ID]x1[ARGS]{"count": 1}[TOOL_CALLS]say[ARGS]{}', 2),
    ):
        calls = stream(Form.MISTRAL, limit=num)
        found = feed(calls, text)
        assert found == (len(text), Verdict(len(text), COMPLETE)), text
        assert calls.results == {"valid": num}
    assert feed(stream(Form.MISTRAL), "[TOOL_CALLS]sub[ARGS]{") is not None


def test_the_reasoning_is_not_looked_at() -> None:
    bad = "<tool_call>{]"
    calls = stream(reasoning_end="</think>")
    assert feed(calls, f"Perhaps {bad}</think>\n\nNo.") is None
    assert feed(stream(reasoning_end="</think>"), f"Perhaps</think>\n{bad}") is not None
    calls = stream(reasoning_end="</think>")
    assert feed(calls, f"Perhaps {bad}") is None
    calls.finish()
    assert calls.unchecked == {"reasoning": 1}


@pytest.mark.parametrize(
    ("schema", "arguments", "why"),
    [
        ({"type": "strange"}, "{}", "schema"),
        ({"$ref": "https://example.com/schema"}, "{}", "schema"),
        ({"$ref": "#/$defs/none"}, "{}", "schema"),
        ({"$ref": "#"}, "{}", "schema"),
        ({"properties": 3}, "{}", "schema"),
        (
            {
                "$defs": {"a": {"anyOf": [{"items": {"$ref": "#/$defs/a"}}] * 2}},
                "$ref": "#/$defs/a",
            },
            "[" * 40 + "]" * 40,
            "schema",
        ),
        ({}, "[" * 70 + "]" * 70, "too_deep"),
        ({}, json.dumps({"text": "x" * (257 * 1024)}), "too_long"),
        ({}, '{"a": 1, "a": 2}', "unreadable"),
        ({}, '{"a": ' + "1" * 5000 + "}", "unreadable"),
    ],
)
def test_what_cannot_be_judged_is_left_alone_and_still_ends(
    schema: Any, arguments: str, why: str
) -> None:
    text = f"<tool_call>{call(arguments, 'tool')}</tool_call>"
    calls = stream(limit=1, tools={"tool": schema})
    assert calls.look(text) == Verdict(len(text), COMPLETE)
    assert calls.unchecked == {why: 1}
    assert not calls.results


def test_a_call_that_the_turn_ends_in_is_unfinished() -> None:
    calls = stream()
    assert feed(calls, '<tool_call>{"name": "add", "arguments": {"count": 12') is None
    calls.finish()
    assert calls.results == {"unfinished": 1}


def test_a_long_call_is_judged_seldom_but_to_the_end() -> None:
    schema = {"properties": {"all": {"items": {"type": "integer"}}}}
    head = '[TOOL_CALLS]tool{"all": [' + ", ".join(["7"] * 4000)
    calls = stream(Form.MISTRAL, tools={"tool": schema})
    assert calls.look(head) is None
    found = feed(calls, head + ", true" + ", 7" * 600)
    assert found is not None
    assert found[1].reason == (
        "invalid_tool_call: tool: arguments.all[4000]: true is not of type integer"
    )


NUMBERS = ["maximum", "minLength", "maxItems"]
BRANCHES = ["anyOf", "allOf", "oneOf", "items", "prefixItems", "additionalProperties", "$ref"]
KEYWORDS = st.sampled_from(
    ["type", "enum", "const", "properties", "required", "nullable", *NUMBERS, *BRANCHES]
)
broken = st.dictionaries(KEYWORDS, anything | schemas | st.lists(anything | schemas), max_size=4)


@given(schema=broken | schemas, document=anything, num_open=st.integers(0, 3))
@settings(max_examples=500, deadline=None)
def test_no_schema_makes_it_fail(schema: Any, document: Any, num_open: int) -> None:
    try:
        objection(compile_schema(schema), document, num_open)
    except SchemaError:
        return


def test_a_reason_can_be_sent() -> None:
    calls = stream(tools={"tool": {"additionalProperties": False}})
    found = calls.look('<tool_call>{"name": "tool", "arguments": {"\\ud800' + "x" * 999 + '": 1,')
    assert found is not None
    assert len(found.reason.encode()) <= 200
