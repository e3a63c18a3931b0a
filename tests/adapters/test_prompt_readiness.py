# SPDX-License-Identifier: Apache-2.0
"""Which engine core is sent deltas, and which worker an array: both only where it is safe."""

import asyncio
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prompt_link import LONG, Client, Core, Link, prompt, request_of
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequestType,
    FinishReason,
)
from vllm.v1.engine.core_client import DPLBAsyncMPClient

from vllm_stateful.adapters.engine import prompt_receiver
from vllm_stateful.adapters.engine.turn import prompt_array
from vllm_stateful.adapters.engine.worker_ids import worker_ids
from vllm_stateful.adapters.frontend import prompt_sender
from vllm_stateful.adapters.frontend.prompt_sender import (
    ask_for_deltas,
    pack,
    sender_of,
    take_misses,
)
from vllm_stateful.transport.wire import BASE_MISS


@pytest.fixture
def link() -> Link:
    """The engine holds ``prompt(LONG)`` as version 1."""
    link = Link()
    link.send(request_of(prompt(LONG, 1)))
    return link


# ---- which engine takes deltas ----------------------------------------------------------------


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """The warnings of the sender."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = prompt_sender.logger
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


async def sent_lengths(client: Any, engine: Any = None) -> list[int]:
    """How many ids go out of two turns: before, and after the engine was heard."""
    lengths = []
    for ids in (prompt(LONG, 1), prompt(LONG, 2), prompt(LONG + 1, 3, parent=2, shared=LONG)):
        message = pack(client, EngineCoreRequestType.ADD, request_of(ids), engine)
        lengths.append((len(message.prompt_token_ids), message.kv_hints is not None))
        for _ in range(3):
            await asyncio.sleep(0)
    assert [length for length, _ in lengths[:2]] == [LONG, LONG]
    return [length if labelled else -length for length, labelled in lengths]


def test_deltas_go_out_once_the_engine_said_that_it_takes_them() -> None:
    client = Client()
    assert asyncio.run(sent_lengths(client)) == [-LONG, LONG, 1]
    assert client.asked == [("stateful", "transport", {}, b"engine-0")]


def test_every_engine_is_asked_for_itself() -> None:
    client = Client()

    async def send() -> None:
        await sent_lengths(client)
        assert await sent_lengths(client, b"engine-1") == [-LONG, LONG, 1]

    asyncio.run(send())
    assert [engine for *_, engine in client.asked] == [b"engine-0", b"engine-1"]


def test_asked_at_the_start_the_first_prompt_is_remembered() -> None:
    async def send() -> Any:
        client = Client()
        ask_for_deltas(client)
        await asyncio.sleep(0.001)
        return len(client.asked), await sent_lengths(client)

    assert asyncio.run(send()) == (2, [LONG, LONG, 1])


@pytest.mark.parametrize("answer", [{"ready": False}, {}, {"off": "no plugin there"}])
def test_an_engine_that_does_not_say_so_is_sent_everything(answer: Any) -> None:
    client = Client(answer)
    assert asyncio.run(sent_lengths(client)) == [-LONG, -LONG, -LONG - 1]
    assert len(client.asked) == 1


def test_an_engine_that_cannot_answer_is_sent_everything_with_one_line(
    warnings: list[str],
) -> None:
    client = Client(AttributeError("no attribute 'stateful'"))
    assert asyncio.run(sent_lengths(client)) == [-LONG, -LONG, -LONG - 1]
    assert len(client.asked) == 1
    assert len(warnings) == 1
    assert "no attribute 'stateful'" in warnings[0]


def test_one_question_that_failed_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    client = Client(TimeoutError("busy"))
    now = [1000.0]
    monkeypatch.setattr(prompt_sender.time, "monotonic", lambda: now[0])

    async def is_labelled() -> bool:
        message = pack(client, EngineCoreRequestType.ADD, request_of(prompt(LONG, 1)), None)
        for _ in range(3):
            await asyncio.sleep(0)
        return message.kv_hints is not None

    async def play() -> None:
        for now[0] in (1000.0, 1000.5, 1001.5, 1002.0, 1003.6, 1003.7):
            assert not await is_labelled()
        assert len(client.asked) == 3, "at once, after one second, and after two more"
        client.answer = {"ready": True}
        now[0] += 60
        assert not await is_labelled()
        assert await is_labelled()

    asyncio.run(play())
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (EngineCoreRequestType.ABORT, ["r"]),
        (EngineCoreRequestType.UTILITY, (0, 1, "method", ())),
        (EngineCoreRequestType.START_DP_WAVE, (1, None)),
    ],
)
def test_other_messages_pass_and_nobody_is_asked(kind: Any, message: Any) -> None:
    client = Client()
    assert pack(client, kind, message, None) is message
    assert client.asked == []


def test_two_clients_are_two_senders() -> None:
    left, right = Client(), Client()
    assert sender_of(left) is sender_of(left)
    headers = [
        sender_of(client).pack(request_of(prompt(5, 1)), b"engine-0").kv_hints.actions[0].payload
        for client in (left, right)
    ]
    assert headers[0]["client"] != headers[1]["client"]


def test_one_core_has_one_receiver() -> None:
    core = Core()
    core.take(request_of([1]))
    hasher = core.request_block_hasher
    core.take(request_of([2]))
    assert core.request_block_hasher is hasher
    assert isinstance(core.stateful_receiver, prompt_receiver.PromptReceiver)


# ---- to the worker ----------------------------------------------------------------------------


def test_the_worker_gets_the_array_of_a_labelled_text_prompt(link: Link) -> None:
    made = link.send(request_of(prompt(LONG + 1, 2, parent=1, shared=LONG)))
    assert worker_ids(made, None, False) == (prompt_array(made), None)


def test_model_runner_v2_gets_all_ids_as_one_array(link: Link) -> None:
    made = link.send(request_of(prompt(LONG, 9)))
    ids, all_ids = worker_ids(made, made._all_token_ids, False)
    assert ids is all_ids is prompt_array(made)
    made.append_output_token_ids([7, 8])
    ids, all_ids = worker_ids(made, made._all_token_ids, False)
    assert ids is prompt_array(made)
    assert all_ids.dtype == np.int32
    assert all_ids.tolist() == list(made._all_token_ids)


@pytest.mark.parametrize(("executor", "nodes"), [("ray", 1), ("mp", 2), (object, 1)])
@pytest.mark.parametrize("is_v2", [False, True])
def test_workers_elsewhere_get_lists_for_v2(executor: Any, nodes: int, is_v2: bool) -> None:
    """They may run without the plugin, and then V2 takes no array."""
    core = Core()
    core.vllm_config.use_v2_model_runner = is_v2
    core.vllm_config.parallel_config.distributed_executor_backend = executor
    core.vllm_config.parallel_config.nnodes = nodes
    assert prompt_receiver._only_vllm_reads_prompts(core) is not is_v2


@pytest.mark.parametrize("all_ids", [None, [1, 2]])
def test_mrope_keeps_the_list(link: Link, all_ids: list[int] | None) -> None:
    made = link.send(request_of(prompt(LONG, 9)))
    assert worker_ids(made, all_ids, True) == (made.prompt_token_ids, all_ids)


def test_prompt_logprobs_keep_the_list(link: Link) -> None:
    params = SamplingParams(max_tokens=4, prompt_logprobs=1)
    made = link.send(request_of(prompt(LONG, 9), sampling_params=params))
    assert worker_ids(made, None, False)[0] is made.prompt_token_ids


def test_a_thinking_budget_keeps_the_list(link: Link) -> None:
    """vLLM searches the prompt for the thinking tokens, as a list."""
    params = SamplingParams(max_tokens=4, thinking_token_budget=10)
    made = link.send(request_of(prompt(LONG, 9), sampling_params=params))
    assert worker_ids(made, None, False)[0] is made.prompt_token_ids


def test_an_unlabelled_prompt_stays_a_list(link: Link) -> None:
    made = link.send(request_of([1, 2, 3]))
    assert worker_ids(made, None, False)[0] is made.prompt_token_ids


def test_a_prompt_that_was_changed_since_stays_a_list(link: Link) -> None:
    """KV connectors for disaggregation cut the prompt's last tokens off."""
    made = link.send(request_of(prompt(LONG, 9)))
    made.num_prompt_tokens -= 1
    assert worker_ids(made, None, False)[0] is made.prompt_token_ids


def test_with_several_engines_an_aborted_request_is_not_sent_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine that answers with a miss leaves the request where the client counts it."""
    monkeypatch.setattr(DPLBAsyncMPClient, "__del__", lambda self: None, raising=False)
    link = Link()
    link.send(request_of(prompt(LONG, 1)))
    link.sender.pack(request_of(prompt(LONG + 1, 2, parent=1, shared=LONG)), b"engine-0")
    client: Any = object.__new__(DPLBAsyncMPClient)
    client.stateful_sender = link.sender
    client.reqs_in_flight = {"r": b"engine-0"}
    client.streaming_reqs = set()  # from vLLM 0.33 on
    client.engine_inflight = {b"engine-0": 1}
    client.resources = SimpleNamespace(engine_dead=False)
    sent: list[Any] = []

    async def send(kind: Any, message: Any, engine: Any) -> None:
        sent.append((kind, pack(client, kind, message, engine), engine))

    client._send_input = send
    miss = EngineCoreOutput("r", [], finish_reason=FinishReason.ERROR, stop_reason=BASE_MISS)
    outputs = EngineCoreOutputs(outputs=[miss])

    async def miss_then_abort() -> list[Any]:
        await DPLBAsyncMPClient.process_engine_outputs(client, outputs)
        await client.abort_requests_async(["r"])
        return take_misses(client, outputs)

    assert asyncio.run(miss_then_abort()) == []
    assert sent == [(EngineCoreRequestType.ABORT, ["r"], b"engine-0")]
    assert outputs.outputs == []
    assert (client.reqs_in_flight, client.engine_inflight) == ({}, {b"engine-0": 0})
