# SPDX-License-Identifier: Apache-2.0
"""Two requests are the same only when everything that the engine is told of them is."""

import copy
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope

from vllm_stateful.adapters.frontend.response_key import HANDED_OUT, SESSION, Uncached, key_of
from vllm_stateful.adapters.frontend.turn_context import (
    NOTHING_KNOWN,
    CacheControl,
    TurnContext,
)
from vllm_stateful.transport import wire
from vllm_stateful.transport.prompt_ids import PromptTokenIds
from vllm_stateful.transport.wire import CLOSE_ACTION, RETAIN_ACTION

KEPT = CacheControl(is_stored=True, is_looked_up=True)
TURN = TurnContext(cache_control=KEPT, tools=b"tools")


def request_of(**changes: Any) -> EngineCoreRequest:
    """A greedy request; ``params`` are those of SamplingParams."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **changes.pop("params", {})})
    fields = {
        "request_id": "r",
        "prompt_token_ids": [1, 2, 3],
        "mm_features": None,
        "sampling_params": params,
        "pooling_params": None,
        "arrival_time": 1.0,
        "lora_request": None,
        "cache_salt": "tenant",
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(**{**fields, **changes})


def key(request: EngineCoreRequest | None = None, turn: TurnContext = TURN) -> bytes | Uncached:
    return key_of(request or request_of(), turn)


def test_equal_requests_have_one_key_whoever_sends_them() -> None:
    again = request_of(request_id="other", arrival_time=9.0, session_id="s", priority=3)
    again.prompt_token_ids = PromptTokenIds([1, 2, 3], version=7)
    again.kv_hints = KvHintsEnvelope("p", "m", [KvHintAction("0", RETAIN_ACTION, "1", {})])
    again.sampling_params.extra_args = {SESSION: "mine"}
    first = request_of(params={"extra_args": {SESSION: "theirs"}})
    assert isinstance(key(first), bytes)
    assert key(first) == key(again)


SENT = sorted(value for name, value in vars(wire).items() if name.endswith("_ACTION"))


@pytest.mark.parametrize("action", SENT)
def test_what_we_say_to_the_engine_ourselves_changes_no_answer(action: str) -> None:
    """But the end of a session: it must reach the engine."""
    said = KvHintsEnvelope("p", "m", [KvHintAction("0", action, "1", {})])
    expected = Uncached.HINTS if action == CLOSE_ACTION else key()
    assert key(request_of(kv_hints=said)) == expected


OTHERS: dict[str, Any] = {
    "n": 2,
    "temperature": 0.7,
    "watermarking": False,
    "seed": 7,
    "stop": ["x"],
    "stop_token_ids": [9],
    "max_tokens": 9,
    "logprobs": 3,
    "logprob_token_ids": [4],
    "thinking_token_budget": 5,
    "structured_outputs": StructuredOutputsParams(choice=["a"]),
    "logit_bias": {1: 2.0},
    "allowed_token_ids": [1],
    "extra_args": {"pinned": 1},
    "bad_words": ["x"],
    "_eos_token_id": 3,
    "_all_stop_token_ids": {3, 4},
    "_bad_words_token_ids": [[1]],
    "skip_reading_prefix_cache": True,
    "trace_decode_token_ids": [1],
}
"""Another value of each field for which one is not made from its own."""

NEVER_KEPT = {"prompt_logprobs", "prompt_logprob_token_ids"}
"""Requests with these are not remembered at all."""


@pytest.mark.parametrize("field", SamplingParams.__struct_fields__)
def test_each_sampling_parameter_that_is_changed_misses(field: str) -> None:
    """Those of the installed vLLM, so one that a later version adds is tested as well."""
    params = request_of(params={"seed": 1}).sampling_params
    before = key(request_of(sampling_params=params))
    changed = copy.copy(params)
    value = getattr(params, field)
    if field in OTHERS:
        other = OTHERS[field]
    elif isinstance(value, bool):
        other = not value
    elif isinstance(value, int | float):
        other = value + 1
    elif field in NEVER_KEPT:
        other = [1]
    elif field in HANDED_OUT:
        other = None if field == "stream_interval" else value
    else:
        other = {"something": "else"}
    setattr(changed, field, other)
    after = key(request_of(sampling_params=changed))
    if field in NEVER_KEPT:
        assert after is Uncached.PROMPT_LOGPROBS
    else:
        assert (after == before) == (field in HANDED_OUT)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_token_ids": [1, 2]},
        {"prompt_token_ids": [1, 2, 4]},
        {"prompt_token_ids": [1, 2, 3, 4]},
        {"cache_salt": "another"},
        {"cache_salt": None},
        {"lora_request": LoRARequest("a", 1, "/a")},
        {"reasoning_ended": True},
        {"reasoning_parser_kwargs": {"chat_template_kwargs": {}}},
    ],
)
def test_each_field_of_the_request_that_is_changed_misses(changes: dict[str, Any]) -> None:
    assert key(request_of(**changes)) != key()


def test_each_part_of_an_adapter_counts() -> None:
    adapters = [LoRARequest("a", 1, "/a"), LoRARequest("b", 1, "/a"), LoRARequest("a", 2, "/a")]
    adapters.append(LoRARequest("a", 1, "/b"))
    assert len({key(request_of(lora_request=adapter)) for adapter in adapters}) == 4


def test_other_tools_or_another_choice_miss() -> None:
    assert key(turn=TurnContext(cache_control=KEPT, tools=b"others")) != key()


def test_the_order_of_a_schema_counts_as_it_makes_another_grammar() -> None:
    schemas = [{"a": 1, "b": 2}, {"b": 2, "a": 1}]
    made = [
        key(request_of(params={"structured_outputs": StructuredOutputsParams(json=schema)}))
        for schema in schemas
    ]
    assert made[0] != made[1]


def test_an_omitted_temperature_is_not_zero() -> None:
    assert key(request_of(sampling_params=SamplingParams(max_tokens=8))) is Uncached.SAMPLED
    assert key(request_of(params={"temperature": 1.0})) is Uncached.SAMPLED
    assert isinstance(key(request_of(params={"temperature": 1.0, "seed": 5})), bytes)


CLOSING = KvHintsEnvelope("p", "m", [KvHintAction("0", CLOSE_ACTION, "1", {})])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt_token_ids": None}, Uncached.MULTIMODAL),
        ({"prompt_is_token_ids": [True, False, True]}, Uncached.MULTIMODAL),
        ({"mm_features": [object()]}, Uncached.MULTIMODAL),
        ({"resumable": True}, Uncached.STREAMED_INPUT),
        ({"kv_hints": CLOSING}, Uncached.HINTS),
        ({"params": {"extra_args": {"kv_transfer_params": {"a": 1}}}}, Uncached.HINTS),
        ({"params": {"extra_args": {"a": object()}}}, Uncached.PARAMETERS),
        ({"params": {"prompt_logprobs": 1}}, Uncached.PROMPT_LOGPROBS),
        ({"data_parallel_rank": 1}, Uncached.DATA_PARALLEL),
        ({"sampling_params": None}, Uncached.SAMPLED),
    ],
)
def test_what_is_not_known_to_be_safe_goes_to_the_engine(
    changes: dict[str, Any], reason: Uncached
) -> None:
    assert key(request_of(**changes)) is reason


def test_without_a_known_source_or_with_no_store_nothing_is_kept() -> None:
    refused = CacheControl(is_stored=False, is_looked_up=False)
    assert key(turn=NOTHING_KNOWN) is Uncached.SOURCE
    assert key(turn=TurnContext(cache_control=refused)) is Uncached.NO_STORE


def test_a_long_prompt_has_the_key_of_its_ids_whatever_it_continues() -> None:
    """Of a remembered prompt only what is new is read; the key is that of a plain list."""
    parent = PromptTokenIds(range(10_000), version=1)
    assert key(request_of(prompt_token_ids=parent)) == key(
        request_of(prompt_token_ids=[*range(10_000)])
    )
    edited = [*range(9_000), 7, 7]
    turn = PromptTokenIds(edited, version=2, parent=1, digests=parent.digests[:2])
    assert key(request_of(prompt_token_ids=turn)) == key(request_of(prompt_token_ids=edited))
    edited[5_000] += 1
    assert key(request_of(prompt_token_ids=turn)) != key(request_of(prompt_token_ids=edited))
