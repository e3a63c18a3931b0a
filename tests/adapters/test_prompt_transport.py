# SPDX-License-Identifier: Apache-2.0
"""A prompt's way to the engine core, through vLLM's own messages, requests and block hasher."""

from typing import Any

import pytest
from prompt_link import BLOCK, LONG, Core, Link, over_the_wire, prompt, request_of, stock_request
from vllm.lora.request import LoRARequest
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
)
from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope
from vllm.v1.request import Request

from vllm_stateful.adapters.engine.prompt_receiver import answer_miss, receive
from vllm_stateful.adapters.engine.turn import is_final, prompt_array
from vllm_stateful.adapters.frontend import prompt_sender
from vllm_stateful.adapters.frontend.identity import HINTS_PROTOCOL
from vllm_stateful.adapters.frontend.prompt_sender import pack
from vllm_stateful.observe.prompt_counts import PromptCounts
from vllm_stateful.transport.header import ACTION, BaseMissError, ChecksumError

CLOSE = KvHintAction("0", "session.close", "1", {})


@pytest.fixture(autouse=True)
def counts(monkeypatch: pytest.MonkeyPatch) -> PromptCounts:
    """The totals of this test alone."""
    made = PromptCounts()
    monkeypatch.setattr(prompt_sender, "PROMPT_COUNTS", made)
    return made


@pytest.fixture
def link() -> Link:
    """The engine holds ``prompt(LONG)`` as version 1."""
    link = Link()
    link.send(request_of(prompt(LONG, 1)))
    return link


def assert_as_stock(made: Request, request: EngineCoreRequest) -> None:
    stock = stock_request(request)
    assert type(made.prompt_token_ids) is list
    assert made.prompt_token_ids == stock.prompt_token_ids
    assert list(made.all_token_ids) == list(stock.all_token_ids)
    assert made.block_hashes == stock.block_hashes
    assert made.kv_hints == stock.kv_hints
    for tokens in ([1], [2] * (BLOCK + 3)):
        made.append_output_token_ids(tokens)
        stock.append_output_token_ids(tokens)
        assert made.block_hashes == stock.block_hashes


# ---- what is sent, and what is made of it ------------------------------------------------------


def test_a_first_prompt_goes_in_full_and_arrives_as_it_would_from_stock() -> None:
    link, request = Link(), request_of(prompt(LONG, 1))
    made = link.send(request)
    array = prompt_array(made)
    assert array is not None
    assert array.tolist() == request.prompt_token_ids
    assert_as_stock(made, request)


@pytest.mark.parametrize("length", [LONG + 1, LONG + BLOCK - 1, LONG + BLOCK, LONG + 3 * BLOCK + 5])
@pytest.mark.parametrize("shared", [LONG, LONG - 1, LONG - BLOCK, LONG - BLOCK - 1])
def test_a_delta_is_short_inherits_hashes_and_arrives_as_from_stock(
    link: Link, length: int, shared: int
) -> None:
    request = request_of(prompt(length, 2, parent=1, shared=shared, first=7))
    message = link.sender.pack(request, b"engine-0")
    assert message.prompt_token_ids == request.prompt_token_ids[shared:]
    before = link.core.num_hashed
    made = link.core.take(over_the_wire(message))
    assert link.core.num_hashed - before == length // BLOCK - shared // BLOCK
    assert_as_stock(made, request)


def test_a_long_conversation_of_deltas(link: Link) -> None:
    length = LONG
    for version in range(2, 30):
        grown = length + 1 + 11 * version % 40
        ids = prompt(grown, version, parent=version - 1, shared=length)
        assert_as_stock(link.send(request_of(ids)), request_of(ids))
        length = grown


def test_a_base_that_ends_inside_a_block_passes_on_its_full_blocks_only(link: Link) -> None:
    inside = prompt(LONG + 5, 2, parent=1, shared=LONG)
    link.send(request_of(inside))
    request = request_of(prompt(LONG + 40, 3, parent=2, shared=LONG + 5, first=3))
    before = link.core.num_hashed
    made = link.send(request)
    assert link.core.num_hashed - before == (LONG + 40) // BLOCK - LONG // BLOCK
    assert_as_stock(made, request)


LORA = LoRARequest("adapter", 1, "/adapter")
OTHER_LORA = LoRARequest("other", 2, "/other")
REPLACED_LORA = LoRARequest("adapter", 1, "/adapter/of/today", load_inplace=True)


@pytest.mark.parametrize(
    ("base", "turn"),
    [
        ({}, {"cache_salt": "a"}),
        ({"cache_salt": "a"}, {}),
        ({"cache_salt": "a"}, {"cache_salt": "b"}),
        ({}, {"lora_request": LORA}),
        ({"lora_request": LORA}, {}),
        ({"lora_request": LORA}, {"lora_request": OTHER_LORA}),
        ({"lora_request": LORA}, {"lora_request": REPLACED_LORA}),
    ],
)
def test_hashes_under_another_salt_or_adapter_are_not_inherited(
    base: dict[str, Any], turn: dict[str, Any]
) -> None:
    link = Link()
    link.send(request_of(prompt(LONG, 1), **base))
    request = request_of(prompt(LONG + BLOCK, 2, parent=1, shared=LONG), **turn)
    before = link.core.num_hashed
    made = link.send(request)
    assert link.core.num_hashed - before == LONG // BLOCK + 1
    assert_as_stock(made, request)


@pytest.mark.parametrize("fields", [{"cache_salt": "a"}, {"lora_request": LORA}])
def test_hashes_under_the_same_salt_or_adapter_are_inherited(fields: dict[str, Any]) -> None:
    link = Link()
    link.send(request_of(prompt(LONG, 1), **fields))
    request = request_of(prompt(LONG + BLOCK, 2, parent=1, shared=LONG), **fields)
    before = link.core.num_hashed
    assert_as_stock(link.send(request), request)
    assert link.core.num_hashed - before == 1 + 1, "and one for the appended tokens"


def test_several_answers_to_one_prompt_cost_no_ids(link: Link) -> None:
    request = request_of(prompt(LONG, 1), request_id="second")
    message = link.sender.pack(request, b"engine-0")
    assert message.prompt_token_ids == []
    before = link.core.num_hashed
    made = link.core.take(over_the_wire(message))
    assert link.core.num_hashed == before
    assert_as_stock(made, request)


def test_without_prefix_caching_a_delta_arrives_and_nothing_is_hashed() -> None:
    link = Link()
    link.core = Core(caching=False)
    link.send(request_of(prompt(LONG, 1)))
    made = link.send(request_of(prompt(LONG + 1, 2, parent=1, shared=LONG)))
    assert (made.prompt_token_ids, made.block_hashes) == (list(range(LONG + 1)), [])


def test_the_request_itself_stays_as_it_is(link: Link) -> None:
    ids = prompt(LONG + 1, 2, parent=1, shared=LONG)
    request = request_of(ids)
    link.sender.pack(request, b"engine-0")
    assert request.prompt_token_ids is ids
    assert request.kv_hints is None


def test_without_a_label_nothing_is_different(link: Link) -> None:
    request = request_of(list(range(LONG)))
    assert link.sender.pack(request, b"engine-0") is request
    made = link.send(request)
    assert prompt_array(made) is None
    assert_as_stock(made, request)


@pytest.mark.parametrize(
    "fields",
    [
        {"resumable": True},
        {"mm_features": ["feature"]},
        {"prompt_is_token_ids": [True]},
        {"prompt_embeds": "tensor"},
        {"kv_hints": KvHintsEnvelope("dynamo/1", "m", [CLOSE])},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_whatever_is_more_than_text_or_has_foreign_hints_goes_out_untouched(
    link: Link, fields: dict[str, Any]
) -> None:
    request = request_of(prompt(LONG + 1, 2, parent=1, shared=LONG), **fields)
    assert link.sender.pack(request, b"engine-0") is request


def test_a_version_of_zero_goes_out_untouched_and_encodes_as_a_list(link: Link) -> None:
    request = request_of(prompt(5))
    assert link.sender.pack(request, b"engine-0") is request
    assert over_the_wire(request).prompt_token_ids == [0, 1, 2, 3, 4]


# ---- hints ------------------------------------------------------------------------------------


def test_the_end_of_a_session_survives_beside_the_label(link: Link) -> None:
    hints = KvHintsEnvelope(HINTS_PROTOCOL, "r", [CLOSE])
    for ids in (prompt(LONG, 7), prompt(LONG + 1, 8, parent=7, shared=LONG)):
        request = request_of(ids, kv_hints=hints)
        message = link.sender.pack(request, b"engine-0")
        assert [action.action_type for action in message.kv_hints.actions] == [
            CLOSE.action_type,
            ACTION,
        ]
        made = link.core.take(over_the_wire(message))
        assert is_final(made)
        assert made.kv_hints == hints
    assert request.kv_hints is hints


def test_foreign_hints_without_a_label_reach_the_engine() -> None:
    hints = KvHintsEnvelope("dynamo/1", "m", [KvHintAction("0", "pin", "1", {"x": 1})])
    assert Link().send(request_of([1, 2], kv_hints=hints)).kv_hints == hints


# ---- a miss -----------------------------------------------------------------------------------


def miss(link: Link, request: EngineCoreRequest) -> EngineCoreOutputs:
    """Send to an engine that has lost its bases; returns its answer as the client decodes it."""
    link.core = Core()
    try:
        link.send(request)
    except BaseMissError:
        assert answer_miss(link.core, request)
    client_index, outputs = link.core.output_queue.get_nowait()
    assert client_index == request.client_index
    assert outputs.finished_requests is None  # the client counts it at this engine core
    decoded: EngineCoreOutputs = over_the_wire(outputs, EngineCoreOutputs)
    return decoded


def test_a_miss_is_taken_out_of_the_outputs_and_sent_again_in_full(
    link: Link, counts: PromptCounts
) -> None:
    request = request_of(prompt(LONG + 1, 2, parent=1, shared=LONG), client_index=3)
    outputs = miss(link, request)
    other = EngineCoreOutput("other", [1])
    outputs.outputs.insert(0, other)
    (again,) = link.sender.take_misses(outputs)
    assert outputs.outputs == [other]
    assert again is request
    message = link.sender.pack(again, b"engine-0")
    assert message.prompt_token_ids == request.prompt_token_ids
    assert_as_stock(link.core.take(over_the_wire(message)), request)
    follower = request_of(prompt(LONG + 2, 3, parent=2, shared=LONG + 1))
    assert len(link.sender.pack(follower, b"engine-0").prompt_token_ids) == 1
    assert counts.snapshot()["prompts_sent"]["delta"] == 2
    assert counts.snapshot()["prompts_sent"]["resent"] == 1


def test_a_miss_of_a_repeated_prompt_is_sent_again_in_full(link: Link) -> None:
    request = request_of(prompt(LONG, 1), request_id="second")
    (again,) = link.sender.take_misses(miss(link, request))
    assert_as_stock(link.send(again), request)


def test_an_aborted_request_is_not_sent_again(link: Link) -> None:
    outputs = miss(link, request_of(prompt(LONG + 1, 2, parent=1, shared=LONG)))
    pack(link.client, EngineCoreRequestType.ABORT, ["r", "unknown"], None)
    assert link.sender.take_misses(outputs) == []


def test_an_aborted_request_does_not_hide_the_miss_of_another(link: Link) -> None:
    first = miss(link, request_of(prompt(LONG + 1, 2, parent=1, shared=LONG)))
    second = request_of(prompt(LONG + 1, 3, parent=1, shared=LONG), request_id="second")
    first.outputs += miss(link, second).outputs
    link.sender.aborted(["r"])
    assert link.sender.take_misses(first) == [second]
    assert first.outputs == []


def test_an_answered_request_is_not_kept(link: Link) -> None:
    request = request_of(prompt(LONG + 1, 2, parent=1, shared=LONG))
    link.send(request)
    answer = EngineCoreOutputs(outputs=[EngineCoreOutput("r", [5], stop_reason="text")])
    assert link.sender.take_misses(answer) == []
    assert [output.new_token_ids for output in answer.outputs] == [[5]]
    assert link.sender._waiting == {}


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("base"), ChecksumError("x")])
def test_what_else_goes_wrong_stays_vllms_to_report(error: Exception) -> None:
    core = Core()
    try:
        raise error
    except Exception:
        assert not answer_miss(core, request_of([1]))
    assert core.output_queue.empty()


def test_outside_of_an_exception_there_is_no_miss() -> None:
    assert not answer_miss(Core(), request_of([1]))


def test_a_miss_tells_vllm_that_the_request_is_over(link: Link) -> None:
    outputs = miss(link, request_of(prompt(LONG + 1, 2, parent=1, shared=LONG)))
    assert outputs.outputs[0].finish_reason == FinishReason.ERROR


def test_a_delta_that_is_put_together_wrongly_is_noticed(link: Link) -> None:
    """Tests of adapters run with ``--stateful-check-invariants``."""
    message = link.sender.pack(request_of(prompt(LONG + 1, 2, parent=1, shared=LONG)), b"engine-0")
    message.prompt_token_ids = [0]
    with pytest.raises(ChecksumError):
        link.core.take(over_the_wire(message))


def test_a_failed_request_leaves_no_hashes_to_the_next(link: Link) -> None:
    message = link.sender.pack(request_of(prompt(LONG + 1, 2, parent=1, shared=LONG)), b"engine-0")

    def fail(core: Any, request: Any) -> Any:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        receive(link.core, over_the_wire(message), fail)
    request = request_of([5] * LONG)
    assert_as_stock(link.send(request), request)
