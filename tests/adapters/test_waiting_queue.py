# SPDX-License-Identifier: Apache-2.0
"""The queue ordered by service, as vLLM's scheduler knows it: against vLLM's own."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_engine import ALICE
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.request import Request, RequestStatus

from vllm_stateful.adapters.engine.waiting_queue import ServiceQueue, named_session_of
from vllm_stateful.adapters.model_input import identity_of
from vllm_stateful.types import SessionKey


def make_request(number: int, session_id: str | None = None) -> Request:
    return Request(
        request_id=str(number),
        prompt_token_ids=[1],
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        session_id=session_id,
    )


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "pop", "skip", "preempt", "remove", "abort"]),
        st.integers(0, 5),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(events=EVENTS)
def test_as_long_as_all_are_served_the_same_it_is_vllms_queue(
    events: list[tuple[str, int]],
) -> None:
    ours, stock = ServiceQueue(clock=lambda: 0.0), FCFSRequestQueue()
    running: list[Request] = []
    for number, (event, amount) in enumerate(events):
        if event == "add":
            request = make_request(number)
            ours.add_request(request)
            stock.add_request(request)
        elif event == "pop" and stock:
            running.append(stock.pop_request())
            assert ours.pop_request() is running[-1]
        elif event == "skip":
            popped = [stock.pop_request() for _ in range(min(amount, len(stock)))]
            assert popped == [ours.pop_request() for _ in popped]
            stock.prepend_requests(reversed(popped))
            ours.prepend_requests(reversed(popped))
        elif event == "preempt" and running:
            request = running.pop(amount % len(running))
            request.status = RequestStatus.PREEMPTED
            stock.prepend_request(request)
            ours.prepend_request(request)
        elif event == "remove" and stock:
            request = list(stock)[amount % len(stock)]
            stock.remove_request(request)
            ours.remove_request(request)
        elif event == "abort":
            gone = [*list(stock)[:amount], *running[:amount]]
            stock.remove_requests(gone)
            ours.remove_requests(gone)
        assert list(ours) == list(stock)
        assert (len(ours), bool(ours)) == (len(stock), bool(stock))
        if stock:
            assert ours.peek_request() is stock.peek_request()


def test_an_empty_queue_has_no_next_and_a_stranger_cannot_be_removed() -> None:
    queue, stranger = ServiceQueue(), make_request(0)
    for take in (queue.peek_request, queue.pop_request):
        with pytest.raises(IndexError):
            take()
    with pytest.raises(ValueError, match="not in"):
        queue.remove_request(stranger)
    queue.remove_requests([stranger])
    queue.prepend_request(stranger)
    assert list(queue) == [stranger]


def test_a_program_is_a_session_of_a_tenant() -> None:
    request = make_request(0, ALICE)
    request.cache_salt = "tenant-a"
    assert named_session_of(request) == SessionKey(identity_of(request), ALICE)
    assert named_session_of(request).identity.cache_salt == "tenant-a"
    assert named_session_of(make_request(1)) is None
    assert named_session_of(make_request(2, "null")) is None


def test_what_a_preempted_turn_computes_again_is_not_counted() -> None:
    """Model runner V2 is sent resumed requests as new ones."""
    queue, request = ServiceQueue(), make_request(0, ALICE)
    queue.admitted(request, 0)
    request.num_preemptions = 1
    queue.admitted(request, 0)
    assert queue._book.served(named_session_of(request)) == request.num_prompt_tokens
