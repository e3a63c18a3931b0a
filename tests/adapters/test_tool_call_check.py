# SPDX-License-Identifier: Apache-2.0
"""From a parsed request to the end of its turn, through vLLM's own output processor."""

from collections.abc import Iterator
from concurrent.futures import wait
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.parser.parser_manager import ParserManager
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest

from vllm_stateful.adapters.frontend import tool_call_check, tool_call_plan
from vllm_stateful.adapters.frontend.identity import identify, stamp
from vllm_stateful.adapters.frontend.tool_call_check import state_maker
from vllm_stateful.answer.tool_call_stream import Form
from vllm_stateful.compat.ledger import patch_of
from vllm_stateful.observe.tool_call_counts import ToolCallCounts

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
GOOD = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
BAD = '<tool_call>\n{"name": "weather", "arguments": {"city": 7, "more": 1}}\n</tool_call>'
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(autouse=True)
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[ToolCallCounts]:
    """Strict, with the totals of this test alone, the patch applied before and undone after."""
    monkeypatch.setenv("VLLM_STATEFUL_TOOL_CALL_CHECK", "strict")
    made = ToolCallCounts()
    for module in (tool_call_plan, tool_call_check):
        monkeypatch.setattr(module, "TOOL_CALL_COUNTS", made)
    patch_of("request-state").apply()
    patch_of("request-state").calls[0].set(state_maker)
    yield made
    patch_of("request-state").undo()
    patch_of("request-state").calls[0].clear()


def http(tool_parser: str | None = "hermes", reasoning: str | None = None, **more: Any) -> Any:
    """An HTTP request to a server with these parsers."""
    parser = ParserManager.get_parser(tool_parser, reasoning, tool_parser is not None, **more)
    state = SimpleNamespace(openai_serving_chat=SimpleNamespace(parser_cls=parser))
    app = SimpleNamespace(state=state)
    return SimpleNamespace(headers={}, state=SimpleNamespace(), _json={}, app=app)


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(**{"messages": USER, "tools": [TOOL], **fields})


def numbered(num: int) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": f"t{place}"}} for place in range(num)]


# ---- what a request says -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "limit", "name"),
    [
        ({}, None, None),
        ({"parallel_tool_calls": True}, None, None),
        ({"parallel_tool_calls": False}, 1, None),
        ({"tool_choice": "required"}, None, None),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, 1, "weather"),
    ],
)
def test_the_limit_is_one_call_where_only_one_is_allowed(
    fields: dict[str, Any], limit: int | None, name: str | None
) -> None:
    plan = tool_call_plan.plan_of(chat(**fields), http())
    assert plan is not None
    assert (plan.form, plan.limit, plan.name) == (Form.HERMES, limit, name)
    assert plan.tools == {"weather": SCHEMA}


@pytest.mark.parametrize("disabled", [True, False])
def test_an_anthropic_request_says_it_too(disabled: bool) -> None:
    request = AnthropicMessagesRequest(
        model="m",
        max_tokens=9,
        messages=USER,
        tools=[{"name": "weather", "input_schema": SCHEMA}],
        tool_choice={"type": "auto", "disable_parallel_tool_use": disabled},
    )
    made = AnthropicServingMessages.to_chat_completion_request(request)
    plan = tool_call_plan.plan_of(made, http())
    assert plan is not None
    assert plan.limit == (1 if disabled else None)
    assert plan.tools == {"weather": SCHEMA}


def test_a_responses_request_says_it_too() -> None:
    tool = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}
    request = ResponsesRequest(input="Hi", tools=[tool], parallel_tool_calls=False)
    plan = tool_call_plan.plan_of(request, http())
    assert plan is not None
    assert (plan.limit, plan.tools) == (1, {"weather": SCHEMA})


@pytest.mark.parametrize(
    ("fields", "server", "why"),
    [
        ({}, {"tool_parser": "pythonic"}, "parser"),
        ({}, {"tool_parser": None}, "parser"),
        ({}, {"is_harmony": True}, "parser"),
        ({}, {"reasoning": "granite"}, "reasoning"),
        ({"min_tokens": 4}, {}, "parameters"),
        ({"ignore_eos": True}, {}, "parameters"),
        ({"add_generation_prompt": False, "continue_final_message": True}, {}, "parameters"),
        ({"tools": [TOOL, TOOL]}, {}, "tools"),
        ({"tools": numbered(tool_call_plan.MAX_TOOLS + 1)}, {}, "tools"),
    ],
)
def test_what_is_not_known_to_be_safe_is_not_checked_and_counted(
    fields: dict[str, Any], server: dict[str, Any], why: str, counts: ToolCallCounts
) -> None:
    assert tool_call_plan.plan_of(chat(**fields), http(**server)) is None
    assert counts.snapshot()["tool_calls_unchecked"] == {why: 1}


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": None}])
def test_without_tools_there_is_nothing_to_count(
    fields: dict[str, Any], counts: ToolCallCounts
) -> None:
    assert tool_call_plan.plan_of(chat(**fields), http()) is None
    assert counts.snapshot()["tool_calls_unchecked"] == {}


def test_every_parser_that_is_known_exists() -> None:
    found = {"hermes": Form.HERMES, "qwen3_json": Form.HERMES, "llama3_json": Form.LLAMA}
    for name, form in {**found, "llama4_json": Form.LLAMA, "mistral": Form.MISTRAL}.items():
        plan = tool_call_plan.plan_of(chat(), http(name))
        assert plan is not None
        assert plan.form == form
    for name in ("qwen3", "deepseek_r1", "mistral"):
        assert tool_call_plan.plan_of(chat(), http(reasoning=name)) is not None


def test_a_parser_of_guided_json_has_two_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    server = http()
    parser = server.app.state.openai_serving_chat.parser_cls.tool_parser_cls
    monkeypatch.setattr(parser, "supports_required_and_named", True)
    named = {"type": "function", "function": {"name": "weather"}}
    for choice, form in (("required", Form.LIST), (named, Form.ARGUMENTS), ("auto", Form.HERMES)):
        plan = tool_call_plan.plan_of(chat(tool_choice=choice), server)
        assert plan is not None
        assert plan.form == form


def large(num: int) -> list[dict[str, Any]]:
    """A tool whose schema is too large to wait for."""
    schema = {"properties": {f"p{place}": {"type": "integer"} for place in range(num)}}
    return [{"type": "function", "function": {"name": "weather", "parameters": schema}}]


def test_another_thread_compiles_a_large_schema() -> None:
    plan = tool_call_plan.plan_of(chat(tools=large(1_000)), http())
    assert plan is not None
    calls = plan.stream(strict=True, reasoning_ended=True)
    text = '<tool_call>{"name": "weather", "arguments": {"p1": "x",'
    assert calls.look(text) is None
    wait([*tool_call_plan._compiling])
    found = calls.look(text + ' "p2": 1,')
    assert found is not None
    assert found.reason.startswith("invalid_tool_call: weather: arguments.p1")


def test_not_too_many_schemas_wait_to_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_call_plan, "MAX_WAITING", 0)
    plan = tool_call_plan.plan_of(chat(tools=large(1_000)), http())
    assert plan is not None
    for num in (1, 2):
        calls = plan.stream(strict=True, reasoning_ended=True)
        assert calls.look(BAD) is None
        assert calls.unchecked == {"schema": 1}, num


# ---- through the output processor --------------------------------------------------------------


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


TOKENIZER = byte_tokenizer()


class Turn:
    """One request in vLLM's output processor."""

    def __init__(self, request: Any, server: Any = None, step: int = 1, **params: Any) -> None:
        self.step = step
        self.processor = OutputProcessor(TOKENIZER, log_stats=False)
        self.request = stamp(
            EngineCoreRequest(
                request_id="r",
                prompt_token_ids=TOKENIZER.encode("prompt"),
                mm_features=None,
                sampling_params=SamplingParams(
                    **{"output_kind": RequestOutputKind.DELTA, "max_tokens": 999, **params}
                ),
                pooling_params=None,
                arrival_time=0.0,
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
                session_id=identify(request, server or http(), None),
            )
        )
        self.request.external_req_id, self.request.request_id = "r", "r-1"

    def play(self, text: str, finish: FinishReason | None = FinishReason.LENGTH) -> "Turn":
        """Add the request, and feed what the engine would generate until the turn ends."""
        self.processor.add_request(self.request, "prompt")
        ids = TOKENIZER.encode(text)
        self.text, self.token_ids, self.aborted = "", [], []
        for place in range(0, len(ids), self.step):
            tokens = ids[place : place + self.step]
            is_last = place + self.step >= len(ids)
            output = EngineCoreOutput("r-1", tokens, finish_reason=finish if is_last else None)
            made = self.processor.process_outputs([output])
            self.aborted += made.reqs_to_abort
            for found in made.request_outputs:
                self.text += found.outputs[0].text
                self.token_ids += found.outputs[0].token_ids
                self.last = found.outputs[0]
            if "r-1" not in self.processor.request_states:
                return self
        return self


STEPS = pytest.mark.parametrize("step", [1, 3, 1000])


@STEPS
def test_the_turn_ends_behind_its_last_call(step: int, counts: ToolCallCounts) -> None:
    turn = Turn(chat(parallel_tool_calls=False), step=step).play(f"Well. {GOOD}\n\nAnd then")
    assert turn.text == f"Well. {GOOD}"
    assert TOKENIZER.decode(turn.token_ids) == turn.text
    assert (turn.last.finish_reason, turn.last.stop_reason) == ("stop", None)
    assert turn.aborted == ([] if step == 1000 else ["r-1"])
    assert counts.snapshot() == {
        "tool_calls_checked": {"valid": 1},
        "tool_calls_unchecked": {},
        "turns_ended_at_tool_call": {"complete": 1},
    }


@STEPS
def test_an_invalid_call_ends_the_turn_and_says_why(step: int, counts: ToolCallCounts) -> None:
    turn = Turn(chat(), step=step).play(BAD)
    assert turn.text == BAD[: BAD.index(' "more"')]
    assert turn.last.finish_reason == "stop"
    assert turn.last.stop_reason == (
        "invalid_tool_call: weather: arguments.city: 7 is not of type string"
    )
    assert counts.snapshot()["turns_ended_at_tool_call"] == {"invalid": 1}


def test_without_strict_only_the_last_call_ends_it(
    monkeypatch: pytest.MonkeyPatch, counts: ToolCallCounts
) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_TOOL_CALL_CHECK", "end")
    turn = Turn(chat()).play(f"{BAD}{GOOD} and")
    assert (turn.text, turn.last.finish_reason) == (f"{BAD}{GOOD} and", "length")
    assert counts.snapshot()["tool_calls_checked"] == {"invalid": 1, "valid": 1}
    assert counts.snapshot()["turns_ended_at_tool_call"] == {}


def test_several_calls_are_left_to_the_model_where_they_are_allowed() -> None:
    turn = Turn(chat()).play(f"{GOOD}{GOOD} and")
    assert (turn.text, turn.last.finish_reason) == (f"{GOOD}{GOOD} and", "length")


def test_stop_strings_still_end_the_turn_where_they_stand(counts: ToolCallCounts) -> None:
    turn = Turn(chat(), stop=["ath"], step=7).play(GOOD)
    assert turn.text == GOOD[: GOOD.index("ath")]
    assert (turn.last.finish_reason, turn.last.stop_reason) == ("stop", "ath")
    assert counts.snapshot()["tool_calls_checked"] == {"unfinished": 1}


def test_a_stop_token_is_left_out_as_by_vllm() -> None:
    turn = Turn(chat()).play("Well.\n", FinishReason.STOP)
    assert (turn.text, turn.last.finish_reason) == ("Well.", "stop")


@pytest.mark.parametrize("ended", [True, False])
def test_reasoning_that_has_not_ended_is_not_looked_at(ended: bool, counts: ToolCallCounts) -> None:
    turn = Turn(chat(), http(reasoning="qwen3"))
    turn.request.reasoning_ended = ended
    turn.play(BAD)
    assert (turn.text == BAD) == (not ended)
    assert counts.snapshot()["tool_calls_unchecked"] == ({} if ended else {"reasoning": 1})


def test_every_one_of_several_answers_is_checked() -> None:
    turn = Turn(chat(parallel_tool_calls=False), n=2)
    parent = ParentRequest(turn.request)
    request_id, params = parent.get_child_info(0)
    turn.request.request_id, turn.request.sampling_params = request_id, params
    turn.processor.add_request(turn.request, "prompt", parent, 0)
    ids = TOKENIZER.encode(f"{GOOD} and")
    made = turn.processor.process_outputs([EngineCoreOutput(request_id, ids)])
    assert made.request_outputs[0].outputs[0].text == GOOD


def test_an_error_in_the_check_leaves_the_answer_to_vllm(
    monkeypatch: pytest.MonkeyPatch, counts: ToolCallCounts
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setattr("vllm_stateful.answer.tool_call_stream.objection", fail)
    turn = Turn(chat()).play(BAD)
    assert (turn.text, turn.last.finish_reason) == (BAD, "length")
    assert counts.snapshot()["tool_calls_unchecked"] == {"error": 1}
    assert counts.snapshot()["tool_calls_checked"] == {}


def test_another_request_does_not_get_the_plan() -> None:
    turn = Turn(chat(parallel_tool_calls=False))
    turn.request.external_req_id = "other"
    assert turn.play(f"{GOOD} and").text == f"{GOOD} and"


def test_a_request_without_tools_has_vllms_own_state() -> None:
    turn = Turn(chat(tools=None))
    turn.processor.add_request(turn.request, "prompt")
    (state,) = turn.processor.request_states.values()
    assert type(state) is not tool_call_check.CheckedRequestState
