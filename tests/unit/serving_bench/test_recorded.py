# SPDX-License-Identifier: Apache-2.0
"""Recorded conversations become plain messages with short answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.policy.traces import KVCT
from benchmarks.serving import recorded
from benchmarks.serving.recorded import NoTracesError, cut_at_sentence, rendered, shared_text

TOOL = {
    "type": "function",
    "function": {
        "name": "get_user",
        "description": "Get a user.",
        "parameters": {"type": "object", "properties": {"user_id": {}, "day": {}}},
    },
}
CALL_TEXT = '<tool_call>\n{"name": "get_user", "arguments": {"user_id": "mia"}}\n</tool_call>'


def count(text: str) -> int:
    """One for each word: long texts are easy to write."""
    return len(text.split())


def call(**arguments: Any) -> dict[str, Any]:
    return {"function": {"name": "get_user", "arguments": json.dumps(arguments)}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    messages = [
        {"role": "system", "content": "Be polite."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "One two. Three four. Five six seven eight nine ten."},
        {"role": "user", "content": "I am mia."},
        {"role": "assistant", "content": None, "tool_calls": [call(user_id="mia")]},
        {"role": "tool", "content": '{"name": "Mia"}'},
        {"role": "assistant", "content": "Hello Mia."},
        {"role": "user", "content": "Now this."},
        {"role": "assistant", "content": "", "tool_calls": [call(user_id="a b c d e f g h")]},
        {"role": "tool", "content": "{}"},
        {"role": "assistant", "content": "Not reached."},
    ]
    row = {"id": "one", "tools": [TOOL], "messages": messages}
    (tmp_path / "text_dev_test.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def test_answers_are_cut_and_calls_are_written_out(folder: Path) -> None:
    (made,) = recorded.conversations(folder, ["test"], count, max_answer_tokens=8)
    assert made.name == "one"
    answers = [(step.answer, step.calls_tool) for step in made.steps]
    assert answers[0] == ("One two. Three four.", False)
    assert answers[1] == (CALL_TEXT, True)
    assert answers[2] == ("Hello Mia.", False)
    assert len(answers) == 3  # the next call is too long to be kept and cannot be cut
    assert [message["role"] for message in made.steps[2].new_messages] == ["tool"]


def test_tools_stand_in_the_system_message(folder: Path) -> None:
    def system(*, has_schemas: bool) -> str:
        (made,) = recorded.conversations(
            folder, ["test"], count, max_answer_tokens=8, has_schemas=has_schemas
        )
        return made.system["content"]

    assert json.dumps(TOOL) in system(has_schemas=True)
    assert "\nget_user(user_id, day): Get a user.\n" in system(has_schemas=False)
    assert system(has_schemas=False).startswith("Be polite.\n\n# Tools")


def test_a_call_with_text_keeps_what_fits_of_the_text(folder: Path) -> None:
    message = {"role": "assistant", "content": "A b. C d e f g.", "tool_calls": [call(user_id="m")]}
    row = {"id": "two", "tools": None, "messages": [message]}
    (folder / "text_dev_two.jsonl").write_text(json.dumps(row) + "\n")
    (made,) = recorded.conversations(folder, ["two"], count, max_answer_tokens=9)
    assert made.steps[0].answer.startswith("A b.\n<tool_call>\n")
    assert made.steps[0].new_messages == ()


def test_cut_at_sentence() -> None:
    assert cut_at_sentence("Short.", count, 3) == "Short."
    assert cut_at_sentence("A b. C d! E f? G", count, 5) == "A b. C d!"
    assert cut_at_sentence("first line\nsecond line of it", count, 4) == "first line"
    assert cut_at_sentence("no end in so many words", count, 3) == ""


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(NoTracesError, match="--traces"):
        recorded.gaps(tmp_path)


def test_gaps_by_what_the_turn_waited_for(tmp_path: Path) -> None:
    rows = [
        {"trigger": "user", "gap_since_prev_s": None},
        {"trigger": "tool", "gap_since_prev_s": 4.0},
        {"trigger": "user", "gap_since_prev_s": 90},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / KVCT).write_text(text)
    assert recorded.gaps(tmp_path) == {"tool": [4.0], "user": [90.0]}


def test_a_conversation_is_written_as_the_server_does_it() -> None:
    system = {"role": "system", "content": "S"}
    messages = [system, {"role": "user", "content": "U"}, {"role": "tool", "content": "T"}]
    text = rendered(messages)
    assert text.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n")
    assert text.endswith("T\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    assert shared_text(system) == "<|im_start|>system\nS<|im_end|>\n"
