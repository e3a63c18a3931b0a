# SPDX-License-Identifier: Apache-2.0
"""Names of called tools in the styles of many models."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_stateful.schedule.tool_calls import first_tool


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(
            'Let me look.\n<tool_call>\n{"name": "read_file", "arguments": {}}\n</tool_call>',
            id="hermes",
        ),
        pytest.param(
            "<tool_call>\n<function=read_file>\n<parameter=path>\na\n</parameter>", id="qwen3 coder"
        ),
        pytest.param("<tool_call>read_file\n<arg_key>path</arg_key>", id="glm"),
        pytest.param('{"name": "read_file", "parameters": {"path": "a"}}', id="llama 3, json"),
        pytest.param(
            '<|python_tag|>{"type": "function", "name": "read_file", "parameters": {}}',
            id="llama 3.1",
        ),
        pytest.param(
            '[{"name": "read_file", "parameters": {"path": "a"}}]', id="tool_choice required"
        ),
        pytest.param('<function=read_file>{"path": "a"}</function>', id="llama 3, function"),
        pytest.param('[TOOL_CALLS] [{"name": "read_file", "arguments": {}}]', id="mistral"),
        pytest.param('[TOOL_CALLS]read_file{"path": "a"}', id="mistral v11"),
        pytest.param('[TOOL_CALLS]read_file[ARGS]{"path": "a"}', id="mistral v13"),
        pytest.param(
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary "
            'to=functions.read_file <|constrain|>json<|message|>{"path": "a"}<|call|>',
            id="gpt-oss",
        ),
        pytest.param(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>read_file\n```json\n{}```", id="deepseek"
        ),
        pytest.param(
            '<|tool_call_begin|>functions.read_file:0<|tool_call_argument_begin|>{"path": "a"}',
            id="kimi",
        ),
    ],
)
def test_styles(answer: str) -> None:
    assert first_tool(answer) == "read_file"


def test_the_first_of_several_calls() -> None:
    call = '<tool_call>\n{"name": "%s", "arguments": {}}\n</tool_call>'
    assert first_tool(call % "one" + call % "two") == "one"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "It is 7.",
        'The answer is {"name": "x", "parameters": {}}, as JSON.',
        "I could call a <tool_call> here.",
        '{"name": "Ada", "age": 3}',
    ],
)
def test_no_call(answer: str) -> None:
    assert first_tool(answer) is None


@given(st.text(max_size=200))
def test_any_text(answer: str) -> None:
    name = first_tool(answer)
    assert name is None or name in answer
