# SPDX-License-Identifier: Apache-2.0
"""Answers from memory through vLLM's own client of the engine core, without its sockets."""

import asyncio
from collections.abc import Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from test_response_key import request_of
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
)
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_stateful.adapters import asked, response_cache
from vllm_stateful.adapters.prompt_sender import BASE_MISS
from vllm_stateful.adapters.response_cache import Responses
from vllm_stateful.adapters.response_epoch import EPOCH, answer_epoch
from vllm_stateful.compat.patch import apply_all
from vllm_stateful.compat.v0_32 import response_abort, response_forget, response_request
from vllm_stateful.observe.response_counts import ResponseCounts

PATCHED = (response_request, response_abort, response_forget)
PATCHES = [each.PATCH for each in PATCHED]


class Client(AsyncMPClient):
    """The real sending and receiving, between lists instead of sockets."""

    def __init__(self, max_bytes: int = 1 << 20, core: Any = None, num_clients: int = 1) -> None:
        self.core_engine, self.client_index = b"engine-0", 0
        self.client_count = num_clients
        self.core = SimpleNamespace() if core is None else core
        self.encoder = MsgpackEncoder()
        self.outputs_queue: Any = asyncio.Queue()
        self.utility_results: dict[int, Any] = {}
        self.resources: Any = SimpleNamespace(engine_dead=False)
        self.added: list[str] = []
        self.ended: list[str] = []
        self.stateful_responses = Responses(self, max_bytes)

    def __del__(self) -> None:
        """There is nothing to shut down."""

    def _ensure_output_queue_task(self) -> None:
        """No socket is read."""

    async def _send_input_message(self, message: Any, engine: Any) -> None:
        request_type, *frames = message
        if request_type == EngineCoreRequestType.ADD.value:
            self.added.append(MsgpackDecoder(EngineCoreRequest).decode(frames).request_id)
        elif request_type == EngineCoreRequestType.ABORT.value:
            self.ended += MsgpackDecoder().decode(frames)
        else:
            _, call_id, method, arguments = MsgpackDecoder().decode(frames)
            answer = None
            if method == "stateful" and arguments and arguments[0] == EPOCH:
                answer = answer_epoch(self.core, **arguments[1])
            self.utility_results[call_id].set_result(answer)

    async def ask(self, name: str, **changes: Any) -> None:
        await self.add_request_async(request_of(request_id=name, **changes))

    async def say(
        self, name: str, *tokens: int, last: FinishReason | None = None
    ) -> dict[str, Any]:
        """One step of the engine; what comes of it, by request."""
        output = EngineCoreOutput(name, list(tokens), finish_reason=last)
        self.outputs_queue.put_nowait(EngineCoreOutputs(outputs=[output]))
        return await self.got()

    async def got(self) -> dict[str, Any]:
        """All that waits to be read: token ids by request, the finish reason behind them."""
        found: dict[str, Any] = {}
        for _ in range(100):
            await asyncio.sleep(0)
            while not self.outputs_queue.empty():
                outputs = (await self.get_output_async()).outputs
                for output in response_cache.with_followers(outputs):
                    mine = found.setdefault(output.request_id, [])
                    mine += output.new_token_ids
                    mine += [] if output.finish_reason is None else [output.finish_reason]
        return found


@pytest.fixture(autouse=True)
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[ResponseCounts]:
    """Patched, from an HTTP request, with totals of this test alone."""
    made = ResponseCounts()
    monkeypatch.setattr(response_cache, "RESPONSE_COUNTS", made)
    apply_all(PATCHES, strict=True, log=response_cache.__dict__.get("logger"))  # type: ignore[arg-type]
    response_request.hook.set(lambda client, asked: client.stateful_responses.is_answered(asked))
    response_abort.hook.set(lambda client, names: client.stateful_responses.aborted(names))
    response_forget.hook.set(response_cache.called)
    response_forget.done.set(response_cache.done)
    token = asked._asked.set(asked.Asked(True, True))
    response_cache._all.clear()
    yield made
    asked._asked.reset(token)
    for patch in reversed(PATCHES):
        patch.undo()
    for each in PATCHED:
        each.hook.clear()
    response_forget.done.clear()


def run(what: Coroutine[Any, Any, None]) -> None:
    asyncio.run(what)


STOP, LENGTH, ABORT = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT


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
        asked._asked.set(asked.Asked(not no_store, is_looked_up=False))
        for name in "ab":
            await client.ask(name)
            await client.say(name, 5, last=STOP)
        asked._asked.set(asked.Asked(True, True))
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


# ---- several API servers -----------------------------------------------------------------------


async def answered(client: Client, name: str, *tokens: int) -> None:
    """One request to its end, at the engine."""
    await client.ask(name)
    await client.say(name, *tokens, last=STOP)


def two_servers() -> tuple[Client, Client]:
    core = SimpleNamespace()
    return Client(core=core, num_clients=2), Client(core=core, num_clients=2)


def test_with_several_servers_answers_are_remembered_once_the_epoch_is_known(
    counts: ResponseCounts,
) -> None:
    async def main() -> None:
        client, _ = two_servers()
        await answered(client, "a", 5)
        await answered(client, "b", 5)
        await client.ask("c")
        assert await client.got() == {"c": [5, STOP]}
        assert client.added == ["a", "b"]
        assert counts.snapshot()["responses"] == {"hit": 1, "joined": 0, "miss": 2, "stored": 1}

    run(main())


@pytest.mark.parametrize("method", ["collective_rpc", "add_lora", "reset_prefix_cache"])
def test_what_another_server_did_to_the_model_is_known_here(method: str) -> None:
    async def main() -> None:
        client, other = two_servers()
        for name in "ab":
            await answered(client, name, 5)
        await other._call_utility_async(method, engine=other.core_engine)
        await client.ask("c")
        assert await client.say("c", 8, last=STOP) == {"c": [8, STOP]}
        await client.ask("d")
        assert await client.got() == {"d": [8, STOP]}
        assert client.added == ["a", "b", "c"]

    run(main())


def test_an_answer_during_which_another_server_changed_the_model_is_not_kept() -> None:
    async def main() -> None:
        client, other = two_servers()
        await answered(client, "a", 5)
        await client.ask("b")
        await client.say("b", 5)
        await other._call_utility_async("collective_rpc", engine=other.core_engine)
        await client.say("b", 6, last=STOP)
        await client.ask("c")
        assert client.added == ["a", "b", "c"]

    run(main())


def test_with_several_servers_nobody_follows_what_began_before() -> None:
    async def main() -> None:
        client, other = two_servers()
        await answered(client, "a", 5)
        changed = {"prompt_token_ids": [7]}
        await client.ask("b", **changed)
        await other._call_utility_async("collective_rpc", engine=other.core_engine)
        await client.ask("c", **changed)
        assert client.added == ["a", "b", "c"]

    run(main())


def test_one_that_leaves_while_the_epoch_is_asked_for_reaches_nobody() -> None:
    async def main() -> None:
        client, _ = two_servers()
        for name in "ab":
            await answered(client, name, 5)
        await client.ask("c")
        await client.abort_requests_async(["c"])
        assert await client.got() == {}
        assert client.added == ["a", "b"]

    run(main())
