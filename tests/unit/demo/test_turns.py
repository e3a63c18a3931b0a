# SPDX-License-Identifier: Apache-2.0
"""Streams put together, sessions that only grow, and the rows made of them."""

import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.demo.agents import AGENTS, NUM_TURNS, TRAVEL_PLANNER
from benchmarks.demo.turns import Answer, Measured, Session, ToolCall, measure


def chunk(usage: Any = None, **delta: Any) -> SimpleNamespace:
    """A streamed chunk as the client library hands it out."""
    finish_reason = delta.pop("finish_reason", None)
    fields = SimpleNamespace(content=None, tool_calls=None)
    fields.__dict__.update(delta)
    choices = [] if usage else [SimpleNamespace(delta=fields, finish_reason=finish_reason)]
    return SimpleNamespace(id="chatcmpl-1", choices=choices, usage=usage)


def piece(arguments: str, name: str | None = None, call_id: str | None = None) -> SimpleNamespace:
    function = SimpleNamespace(name=name, arguments=arguments)
    return SimpleNamespace(index=0, id=call_id, function=function)


def client_that_streams(chunks: list[SimpleNamespace]) -> Any:
    completions = SimpleNamespace(create=lambda **_: iter(chunks))
    return SimpleNamespace(chat=SimpleNamespace(completions=completions))


def usage(cached: int | None) -> SimpleNamespace:
    details = None if cached is None else SimpleNamespace(cached_tokens=cached)
    return SimpleNamespace(prompt_tokens=300, completion_tokens=9, prompt_tokens_details=details)


def measured(answer: Answer, num_prompt_tokens: int = 100) -> Measured:
    return Measured(answer, 1.0, 2.0, 0.1, num_prompt_tokens, 0, 9)


def test_tool_call_is_put_together_from_its_pieces() -> None:
    chunks = [
        chunk(content=""),
        chunk(tool_calls=[piece("", "get_weather", "call-1")]),
        chunk(tool_calls=[piece('{"city": ')]),
        chunk(tool_calls=[piece('"Oslo"}')], finish_reason="tool_calls"),
        chunk(usage=usage(256)),
    ]
    result = measure(client_that_streams(chunks), "m", "s", {})
    assert result.answer == Answer(
        "", [ToolCall("call-1", "get_weather", '{"city": "Oslo"}')], "tool_calls"
    )
    assert result.answer_id == "chatcmpl-1"
    assert (result.num_prompt_tokens, result.num_computed_tokens) == (300, 44)
    assert 0 < result.first_chunk_ms <= result.ttft_ms <= 1000 * result.total_s


def test_nothing_reused_when_the_server_gives_no_details() -> None:
    result = measure(
        client_that_streams([chunk(content="Hi"), chunk(usage=usage(None))]), "", "", {}
    )
    assert result.num_cached_tokens == 0


def test_stream_without_an_answer_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="without an answer"):
        measure(client_that_streams([chunk(content="")]), "m", "s", {})


def test_answers_are_compared_without_their_ids() -> None:
    first = Answer("", [ToolCall("call-1", "f", "{}")], "stop")
    assert first.says_the_same(Answer("", [ToolCall("call-2", "f", "{}")], "stop"))
    assert not first.says_the_same(Answer("", [ToolCall("call-1", "f", '{"a": 1}')], "stop"))


def test_session_grows_by_appending_only() -> None:
    session = Session(TRAVEL_PLANNER, "run")
    transcripts = []
    for step in TRAVEL_PLANNER.steps:
        body = session.ask(step)
        transcripts.append(json.dumps(body["messages"])[:-1])
        call = ToolCall("call-1", "get_weather", '{"city": "Oslo", "month": 1, "days": 5}')
        turn = measured(Answer("", [call]))
        session.advance(turn)
        assert turn.is_valid_call
    for before, after in itertools.pairwise(transcripts):
        assert after.startswith(before)
    assert [message["role"] for message in session.messages[-2:]] == ["assistant", "tool"]


def test_answer_without_a_call_is_kept_but_not_valid() -> None:
    session = Session(TRAVEL_PLANNER, "run")
    session.ask(TRAVEL_PLANNER.steps[0])
    turn = measured(Answer("I do not know."))
    session.advance(turn)
    assert not turn.is_valid_call
    assert turn.num_new_tokens == 100
    assert session.messages[-1] == {"role": "assistant", "content": "I do not know."}


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.key)
def test_agent_asks_only_for_tools_it_has(agent: Any) -> None:
    names = {tool.name for tool in agent.tools}
    assert len(agent.steps) == NUM_TURNS
    assert len(names) == 5
    assert {step.tool for step in agent.steps} - {None} <= names
    assert any(step.tool is None for step in agent.steps)
    assert agent.steps[0].user
