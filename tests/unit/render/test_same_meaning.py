# SPDX-License-Identifier: Apache-2.0
"""Which rendered answers mean the same as the generated one."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_stateful.render.same_meaning import means_the_same

CALL = (
    '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": [1, 2.50, null, "x y"]}}\n</tool_call>'
)

SAME = [
    ("", ""),
    ("The answer.", "The answer."),
    ("The answer.", " The answer.\n"),
    ('{"x":1} is JSON', '{"x":1} is JSON'),
    (CALL, CALL.replace(" ", "").replace("xy", "x y").replace("<tool_call>\n", "<tool_call>")),
    (CALL, CALL.replace('"a": 1, "b"', '"a" :\n1,"b"')),
    ("I look. " + CALL, "\nI look. " + CALL),
    (
        '{"name": "f", "parameters": {"b": 1, "a": 2}}',
        '{"name": "f", "parameters": {"a": 2, "b": 1}}',
    ),
    ('{"name": "é", "arguments": {}}', '{"name": "\\u00e9", "arguments": {}}'),
]
DIFFERENT = [
    ("I look." + CALL, "I look.\n" + CALL),  # white space inside the text before the call
    ("The answer.", "The  answer."),
    ("The answer.", "<think>x</think>The answer."),
    ('{"x": 1}', '{"x":1}'),  # JSON in an answer's own text
    ('{"name": "f"}', '{"name":"f"}'),
    ('{"name": "f", "arguments": "{}"}', '{"name":"f","arguments":"{}"}'),
    (CALL, CALL.replace("1, 2", "1.0, 2")),
    (CALL, CALL.replace('"a": 1', '"a": true')),
    (CALL, CALL.replace("null", "0")),
    (CALL, CALL.replace("x y", "x  y")),
    (CALL, CALL + CALL),
    (CALL, CALL.replace("tool_call", "toolcall")),
    (CALL, CALL.replace('"a": 1', '"a": 1, "a": 1')),  # a key twice
    ('{"name": "f", "arguments": {"a": NaN}}', '{"name": "f", "arguments": {"a": "nan"}}'),
    ("[" * 3000, "[" * 2999),
]


@pytest.mark.parametrize(("rendered", "generated"), SAME)
def test_the_same(rendered: str, generated: str) -> None:
    assert means_the_same(rendered, generated)
    assert means_the_same(generated, rendered)


@pytest.mark.parametrize(("rendered", "generated"), DIFFERENT)
def test_different(rendered: str, generated: str) -> None:
    assert not means_the_same(rendered, generated)
    assert not means_the_same(generated, rendered)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@given(
    st.text(max_size=20).filter(lambda text: "{" not in text),
    st.dictionaries(st.text(max_size=4), values, max_size=4),
    st.dictionaries(st.text(max_size=4), values, max_size=4),
    st.sampled_from([None, 1, "\t"]),
)
def test_calls_are_compared_as_json_values(
    text: str, left: dict[str, object], right: dict[str, object], indent: object
) -> None:
    """Equal exactly when a canonical dump is: it tells 1 from true, and minds no white space."""

    def canonical(arguments: dict[str, object]) -> str:
        return json.dumps(arguments, sort_keys=True)

    first = text + json.dumps({"name": "f", "arguments": left})
    second = text + json.dumps({"arguments": right, "name": "f"}, indent=indent)  # type: ignore[arg-type]
    assert means_the_same(first, second) == (canonical(left) == canonical(right))
