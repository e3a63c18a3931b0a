# SPDX-License-Identifier: Apache-2.0
"""Answers from memory through vLLM's own client of the engine core, without its sockets."""

import asyncio
from typing import Any

import pytest
from response_client import ABORT, LENGTH, STOP, Client, run
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
)
from vllm.v1.engine.output_processor import RequestOutputCollector

from vllm_stateful.adapters.frontend import response_cache
from vllm_stateful.adapters.frontend.turn_context import CacheControl, begin
from vllm_stateful.observe.response_counts import ResponseCounts
from vllm_stateful.transport.wire import BASE_MISS

pytestmark = pytest.mark.usefixtures("counts")


def test_an_equal_request_is_answered_in_the_same_steps_without_the_engine(
    counts: ResponseCounts,
) -> None:
    async def main() -> None:
        client = Client()
        await client.ask("a")
        assert await client.say("a", 5) == {"a": [5]}
        assert await client.say("a", 6, 7, last=LENGTH) == {"a": [6, 7, LENGTH]}
        await client.ask("b")
        steps = []
        while len(steps) < 2:
            steps += (await client.get_output_async()).outputs
        assert [step.new_token_ids for step in steps] == [[5], [6, 7]]
        assert [step.finish_reason for step in steps] == [None, LENGTH]
        first, last = steps
        assert first.request_id == last.request_id == "b"
        assert [event.type for event in first.events] == list(EngineCoreEventType)[:2]
        assert first.prefill_stats.num_cached_tokens == 3
        assert last.prefill_stats is None
        assert client.added == ["a"]
        assert counts.snapshot()["responses"] == {"hit": 1, "joined": 0, "miss": 1, "stored": 1}

    run(main())


def test_what_is_in_flight_is_computed_once_also_for_those_who_come_later() -> None:
    async def main() -> None:
        client = Client()
        await client.ask("a")
        await client.ask("b")
        assert await client.say("a", 5) == {"a": [5], "b": [5]}
        await client.ask("c")
        assert await client.say("a", 6, last=STOP) == {
            "a": [6, STOP],
            "b": [6, STOP],
            "c": [5, 6, STOP],
        }
        assert client.added == ["a"]
        await client.ask("d")
        assert await client.got() == {"d": [5, 6, STOP]}

    run(main())


def test_one_that_comes_while_outputs_wait_to_be_read_gets_its_steps_in_their_order() -> None:
    async def main() -> None:
        client = Client()
        await client.ask("a")
        assert await client.say("a", 5) == {"a": [5]}
        waiting = [
            EngineCoreOutput("a", [n], finish_reason=LENGTH if n == 8 else None) for n in (6, 7, 8)
        ]
        for output in waiting[:2]:
            client.outputs_queue.put_nowait(EngineCoreOutputs(outputs=[output]))
        await client.ask("b")
        client.outputs_queue.put_nowait(EngineCoreOutputs(outputs=waiting[2:]))
        assert await client.got() == {"a": [6, 7, 8, LENGTH], "b": [5, 6, 7, 8, LENGTH]}

    run(main())


def test_one_that_follows_begins_as_vllm_expects_whenever_it_comes() -> None:
    async def main() -> None:
        client = Client()
        await client.ask("a")
        await client.ask("early")
        events = [EngineCoreEvent.new_event(EngineCoreEventType.QUEUED, 1.0)]
        first = EngineCoreOutput("a", [5], events=events)
        early = response_cache.with_followers([first])[1]
        assert (early.request_id, early.events) == ("early", events)
        await client.ask("late")
        seen = response_cache.with_followers([EngineCoreOutput("a", [6])])
        late = [output for output in seen if output.request_id == "late"]
        assert [event.type for event in late[0].events] == list(EngineCoreEventType)[:2]
        assert late[0].prefill_stats.num_cached_tokens == 3
        rest = [late[1], *(output for output in seen if output.request_id == "early")]
        assert all(output.events is output.prefill_stats is None for output in rest)

    run(main())


def test_nobody_sees_what_vllm_does_to_the_tokens_of_another() -> None:
    """It adds later tokens to a step's list where a reader is slow, and cuts it at a stop."""

    async def main() -> None:
        client = Client()
        await client.ask("a")
        await client.ask("b")
        shown: dict[str, RequestOutput] = {}
        for number in (5, 6, 7):
            step = EngineCoreOutput("a", [number], finish_reason=LENGTH if number == 7 else None)
            for output in response_cache.with_followers([step]):
                mine = RequestOutput(output.request_id, None, None, None, [], False)
                mine.outputs = [CompletionOutput(0, "", output.new_token_ids, None, None)]
                said = shown.setdefault(output.request_id, mine)
                if said is not mine:
                    said.add(mine, aggregate=True)
        await client.ask("c")
        assert [list(each.outputs[0].token_ids) for each in shown.values()] == [[5, 6, 7]] * 2
        steps = []
        while len(steps) < 3:
            steps += (await client.get_output_async()).outputs
        assert [step.new_token_ids for step in steps] == [[5], [6], [7]]
        steps[0].new_token_ids.clear()
        await client.ask("d")
        assert await client.got() == {"d": [5, 6, 7, LENGTH]}

    run(main())


def test_one_that_leaves_does_not_end_what_others_wait_for() -> None:
    async def main() -> None:
        client = Client()
        for name in "abc":
            await client.ask(name)
        await client.abort_requests_async(["b"])
        await client.abort_requests_async(["a"])
        assert client.ended == []
        assert await client.say("a", 5) == {"a": [5], "c": [5]}
        await client.abort_requests_async(["c"])
        assert client.ended == ["a"]
        await client.ask("d")
        assert client.added == ["a", "d"]

    run(main())


def test_an_answer_that_a_stop_string_ended_is_kept_and_ends_there_again() -> None:
    async def main() -> None:
        client = Client()
        await client.ask("a")
        await client.say("a", 5)
        await client.say("a", 6)
        response_cache.stopped(["a"])
        await client.abort_requests_async(["a"])
        assert client.ended == ["a"]
        await client.ask("b")
        assert await client.got() == {"b": [5, 6]}
        assert client.added == ["a"]

    run(main())


@pytest.mark.parametrize("how", ["client", "engine"])
def test_an_answer_that_was_cut_off_is_not_kept(how: str) -> None:
    async def main() -> None:
        client = Client()
        await client.ask("a")
        await client.say("a", 5, last=None if how == "client" else ABORT)
        await client.abort_requests_async(["a"] if how == "client" else [])
        await client.ask("b")
        assert client.added == ["a", "b"]

    run(main())


def test_the_fate_that_the_engine_gives_a_request_is_that_of_all_who_wait_for_it() -> None:
    async def main() -> None:
        client = Client()
        await client.ask("a")
        await client.ask("b")
        assert await client.say("a", last=ABORT) == {"a": [ABORT], "b": [ABORT]}

    run(main())


def test_a_replay_that_nobody_waits_for_ends() -> None:
    async def main() -> None:
        client = Client()
        await client.ask("a")
        for n in range(50):
            await client.say("a", n, last=STOP if n == 49 else None)
        await client.ask("b")
        await asyncio.sleep(0)
        await client.abort_requests_async(["b"])
        assert len((await client.got()).get("b", [])) < 50
        assert client.ended == []
        assert not client.stateful_responses._replays

    run(main())


def test_tenants_never_share_not_even_what_is_in_flight() -> None:
    async def main() -> None:
        client = Client()
        await client.ask("a", cache_salt="one")
        await client.ask("b", cache_salt="two")
        await client.say("a", 5, last=STOP)
        await client.ask("c", cache_salt="two")
        assert client.added == ["a", "b"]
        assert await client.say("b", 8, last=STOP) == {"b": [8, STOP], "c": [8, STOP]}

    run(main())


@pytest.mark.parametrize(("no_store", "added"), [(True, ["a", "b", "c"]), (False, ["a", "b"])])
def test_no_store_leaves_no_trace_and_no_cache_asks_the_engine(
    no_store: bool, added: list[str]
) -> None:
    async def main() -> None:
        client = Client()
        begin("", CacheControl(not no_store, is_looked_up=False))
        for name in "ab":
            await client.ask(name)
            await client.say(name, 5, last=STOP)
        begin("", CacheControl(True, is_looked_up=True))
        await client.ask("c")
        assert client.added == added

    run(main())


@pytest.mark.parametrize(
    ("method", "is_kept"),
    [
        ("reset_prefix_cache", False),
        ("collective_rpc", False),
        ("add_lora", False),
        ("sleep", False),
        ("set_weight_version", False),
        ("something_new", False),
        ("stateful", True),
        ("is_sleeping", True),
    ],
)
def test_all_is_forgotten_when_the_model_may_answer_otherwise(method: str, is_kept: bool) -> None:
    async def main() -> None:
        client = Client()
        await client.ask("a")
        await client.say("a", 5, last=STOP)
        other = {"prompt_token_ids": [7]}
        await client.ask("flies", **other)
        await client.say("flies", 5)
        await client._call_utility_async(method, engine=client.core_engine)
        await client.ask("b")
        await client.ask("c", **other)
        await client.say("flies", 6, last=STOP)
        await client.ask("d", **other)
        assert client.added == (["a", "flies"] if is_kept else ["a", "flies", "b", "c"])

    run(main())


def test_a_request_that_is_sent_again_does_not_wait_for_itself() -> None:
    """The engine had lost the base of its prompt (``prompt-answers``)."""

    async def main() -> None:
        client = Client()
        await client.ask("a")
        miss = EngineCoreOutput("a", [], finish_reason=STOP, stop_reason=BASE_MISS)
        assert response_cache.with_followers([miss]) == [miss]
        await client.ask("a")
        assert client.added == ["a", "a"]
        assert await client.say("a", 5, last=STOP) == {"a": [5, STOP]}

    run(main())


def test_an_answer_for_which_there_is_no_room_is_not_kept(counts: ResponseCounts) -> None:
    async def main() -> None:
        client = Client(max_bytes=1000)
        for name in "ab":
            await client.ask(name)
            await client.say(name, *range(100), last=STOP)
        assert client.added == ["a", "b"]
        assert counts.snapshot()["response_cache_bytes"] == 0
        assert counts.snapshot()["responses"]["stored"] == 0

    run(main())


def test_a_stream_from_memory_comes_in_the_pieces_of_the_first_time() -> None:
    """Through vLLM's collector, which joins what its reader has not taken yet."""

    async def main() -> None:
        client = Client()
        await client.ask("a")
        for number in range(8):
            await client.say("a", number, last=STOP if number == 7 else None)
        collector = RequestOutputCollector(RequestOutputKind.DELTA, "b")

        async def handle() -> None:
            while True:
                for output in (await client.get_output_async()).outputs:
                    made = RequestOutput("b", None, None, None, [], False)
                    made.outputs = [CompletionOutput(0, "", output.new_token_ids, None, None)]
                    collector.put(made)

        async def middleware() -> Any:
            return await collector.get()

        handler = asyncio.create_task(handle())
        await client.ask("b")
        pieces: list[list[int]] = []
        while sum(map(len, pieces)) < 8:
            answer = await asyncio.create_task(middleware())
            pieces.append(list(answer.outputs[0].token_ids))
        handler.cancel()
        assert pieces == [[number] for number in range(8)]

    run(main())
