# SPDX-License-Identifier: Apache-2.0
"""vLLM's own client of several engine cores sends a turn where its conversation is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prompt_link import prompt, request_of
from vllm.v1.engine.core_client import DPLBAsyncMPClient
from vllm.v1.engine.input_processor import InputProcessor

from vllm_stateful.adapters.frontend import session_affinity
from vllm_stateful.observe.prompt_counts import PROMPT_COUNTS
from vllm_stateful.transport.session_affinity import Choice


class Client(DPLBAsyncMPClient):  # type: ignore[misc]
    """The parts of vLLM's client that choose, without engine cores."""

    def __init__(self, num_engines: int, client_count: int = 1) -> None:
        self.core_engines = [i.to_bytes(2, "little") for i in range(num_engines)]
        self.lb_engines = [[0, 0, 0.0] for _ in self.core_engines]
        self.engine_inflight = Counter()
        self.reqs_in_flight = {}
        self.streaming_reqs = set()  # from vLLM 0.33 on
        self.client_count, self.client_index, self.eng_start_index = client_count, 0, 0

    def serve(self, request: Any, opening: str | None = None) -> int:
        """Where vLLM sends it; it is answered at once."""
        session_affinity.choose(request, opening)
        InputProcessor.assign_request_id(request)  # as AsyncLLM does meanwhile
        engine = self.get_core_engine_for_request(request)
        session_affinity.went(self, request, engine)
        del self.reqs_in_flight[request.request_id]
        self.engine_inflight[engine] -= 1
        self.lb_engines = [[0, 0, 0.0] for _ in self.core_engines]
        return self.core_engines.index(engine)


@pytest.fixture(autouse=True)
def _nobody_chooses_afterwards() -> Iterator[None]:
    yield
    session_affinity.watch(SimpleNamespace(), True)


@pytest.fixture
def client() -> Client:
    made = Client(3)
    session_affinity.watch(made, True)
    return made


def chosen() -> dict[str, int]:
    return dict.fromkeys(Choice, 0) | PROMPT_COUNTS.snapshot()["engine_choices"]


def turn(request_id: str, **fields: Any) -> Any:
    return request_of(prompt(20), request_id=request_id, **fields)


def test_stock_vllm_sends_the_turns_of_a_conversation_everywhere() -> None:
    client = Client(3)
    assert {client.serve(turn(f"r{i}", session_id="session")) for i in range(6)} == {0, 1, 2}


def test_a_session_stays_where_it_began(client: Client) -> None:
    before = chosen()
    assert len({client.serve(turn(f"a{i}", session_id="session a")) for i in range(6)}) == 1
    assert len({client.serve(turn(f"b{i}", session_id="session b")) for i in range(6)}) == 1
    after = chosen()
    assert after[Choice.HOME] - before[Choice.HOME] == 10
    assert after[Choice.NEW] - before[Choice.NEW] == 2


def test_without_a_session_id_the_tokens_tell(client: Client) -> None:
    at = client.serve(request_of(prompt(300, 1), request_id="r0"))
    for i in range(1, 5):
        ids = prompt(300 + i, i + 1, parent=i, shared=299 + i)
        ids.parent_ends = True
        assert client.serve(request_of(ids, request_id=f"r{i}")) == at


def test_without_a_session_id_the_opening_tells(client: Client) -> None:
    assert len({client.serve(turn(f"r{i}"), "opening") for i in range(5)}) == 1


def test_tenants_do_not_share_a_home(client: Client) -> None:
    """By chance they may have the same; what is kept of one does not lead the other."""
    client.serve(turn("a", session_id="session", cache_salt="one"))
    before = chosen()
    client.serve(turn("b", session_id="session", cache_salt="two"))
    assert chosen()[Choice.NEW] - before[Choice.NEW] == 1


def test_the_clients_own_choice_is_left_alone(client: Client) -> None:
    before = chosen()
    for rank in (2, 0, 1):
        assert client.serve(turn(f"r{rank}", session_id="s" * 9, data_parallel_rank=rank)) == rank
    assert chosen()[Choice.CLIENT] - before[Choice.CLIENT] == 3
    assert client.serve(turn("last", session_id="s" * 9)) == 1


def test_who_has_too_much_to_do_is_spared(client: Client) -> None:
    home = client.serve(turn("r0", session_id="session"))
    client.lb_engines[home] = [5, 5, 0.9]
    before = chosen()
    assert client.serve(turn("r1", session_id="session")) != home
    assert chosen()[Choice.MOVED] - before[Choice.MOVED] == 1


def test_requests_in_flight_count_though_the_engine_has_not_said_so(client: Client) -> None:
    home = client.serve(turn("r0", session_id="session"))
    client.engine_inflight[client.core_engines[home]] = 9
    assert client.serve(turn("r1", session_id="session")) != home


def test_several_api_servers_find_a_session(client: Client) -> None:
    ranks = []
    for _ in range(2):
        server = Client(4, client_count=2)
        session_affinity.watch(server, True)
        ranks.append([server.serve(turn(f"r{i}", session_id=f"session {i}")) for i in range(20)])
    assert ranks[0] == ranks[1]
    assert len(set(ranks[0])) == 4


def test_pooling_is_vllms_own(client: Client) -> None:
    before = chosen()
    request = turn("r", session_id="session")
    request.pooling_params = SimpleNamespace()
    session_affinity.choose(request, None)
    assert request.data_parallel_rank is None
    assert chosen() == before


def test_one_engine_core_needs_no_choice() -> None:
    session_affinity.watch(SimpleNamespace(core_engines=[b"0"]), True)
    request = turn("r", session_id="session")
    session_affinity.choose(request, None)
    assert request.data_parallel_rank is None
    assert session_affinity.opening(SimpleNamespace(_json={"messages": []})) is None


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_DISABLE", "session-affinity")
    client = Client(3)
    session_affinity.watch(client, True)
    monkeypatch.undo()
    assert {client.serve(turn(f"r{i}", session_id="session")) for i in range(6)} == {0, 1, 2}


def test_without_the_transport_it_is_off() -> None:
    client = Client(3)
    session_affinity.watch(client, False)
    assert {client.serve(turn(f"r{i}", session_id="session")) for i in range(6)} == {0, 1, 2}


def test_the_opening_comes_from_the_body_of_the_request(client: Client) -> None:
    message = {"role": "user", "content": "Why?"}
    found = session_affinity.opening(SimpleNamespace(_json={"messages": [message]}))
    assert found is not None
    assert session_affinity.opening(SimpleNamespace(_json={"input": [message]})) == found
    assert session_affinity.opening(SimpleNamespace(_json={"prompt": "Why?"})) is None
    assert session_affinity.opening(None) is None
