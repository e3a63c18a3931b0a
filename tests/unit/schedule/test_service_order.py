# SPDX-License-Identifier: Apache-2.0
"""Waiting turns, those of the least served sessions first."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_stateful.config import OPTIONS
from vllm_stateful.schedule.service_order import (
    FIRST_LEVEL,
    MAX_WAIT_S,
    NUM_LEVELS,
    OUTPUT_WEIGHT,
    SLACK,
    ServiceBook,
    ServiceOrder,
    Ticket,
)


def new_order(**served: int) -> tuple[ServiceBook, ServiceOrder[str]]:
    book = ServiceBook()
    for session, num_tokens in served.items():
        book.charge(session, num_tokens)
    return book, ServiceOrder(book)


def drain(order: ServiceOrder[str], now_s: float = 0.0) -> list[str]:
    expected = order.in_order(now_s)
    found = [order.pop(now_s) for _ in range(len(order))]
    assert found == expected
    return found


# ---- service ---------------------------------------------------------------------------------


def test_an_output_token_counts_more_than_a_prompt_token() -> None:
    book = ServiceBook()
    book.charge("a", num_prompt=100, num_output=10)
    book.charge("a", num_prompt=1)
    assert book.served("a") == 101 + 10 * OUTPUT_WEIGHT
    assert book.served("b") == book.served(None) == 0


def test_levels_are_four_times_as_wide_as_the_one_before() -> None:
    book = ServiceBook()
    edges = [0, *(FIRST_LEVEL * 4**n for n in range(NUM_LEVELS - 1))]
    for level, edge in enumerate(edges):
        book.charge(level, edge)
        assert book.level(level) == level
    for level, (low, high) in enumerate(pairwise(edges)):
        book.charge("until", high - 1 - book.served("until"))
        assert low <= book.served("until") < high
        assert book.level("until") == level
    book.charge("most", 10**12)
    assert book.level("most") == NUM_LEVELS - 1


def test_the_one_that_was_served_longest_ago_is_forgotten() -> None:
    book = ServiceBook(max_sessions=2)
    for session in ("a", "b", "a", "c"):
        book.charge(session, 5000)
    assert [book.served(session) for session in "abc"] == [10_000, 0, 5000]
    assert len(book) == 2


def test_turns_of_their_own_are_not_remembered() -> None:
    book = ServiceBook()
    book.charge(None, 10**9)
    assert (len(book), book.level(None)) == (0, 0)


# ---- order -----------------------------------------------------------------------------------


def test_the_least_served_program_goes_first() -> None:
    _, order = new_order(long=10**6, middle=20_000, short=100)
    for session in ("long", "middle", "short", "new"):
        order.add(session, session, 0.0)
    order.add("anonymous", None, 0.0)
    assert drain(order) == ["short", "new", "anonymous", "middle", "long"]


def test_programs_of_similar_service_go_by_arrival() -> None:
    _, order = new_order(a=FIRST_LEVEL - 1, b=0, c=FIRST_LEVEL // 2)
    for session in "abc":
        order.add(session, session, 0.0)
    assert drain(order) == ["a", "b", "c"]


def test_a_turn_that_has_waited_long_enough_goes_before_all_that_have_not() -> None:
    _, order = new_order(long=10**6, longer=10**7)
    order.add("longer", "longer", 0.0)
    order.add("long", "long", 1.0)
    order.add("short", None, 2.0)
    assert order.in_order(MAX_WAIT_S - 0.1)[0] == "short"
    assert order.in_order(MAX_WAIT_S) == ["longer", "short", "long"]
    assert drain(order, MAX_WAIT_S + 1.0) == ["longer", "long", "short"]


def test_waiting_turns_sink_with_what_their_program_is_served() -> None:
    """A session that sends many turns at once does not take its turn with each of them."""
    book, order = new_order()
    for number in range(3):
        order.add(f"wide-{number}", "wide", 0.0)
    order.add("other", "other", 0.0)
    assert order.pop(0.0) == "wide-0"
    book.charge("wide", 20_000)
    assert drain(order) == ["other", "wide-1", "wide-2"]


def test_neither_time_nor_service_changes_the_answer_until_it_is_taken() -> None:
    book, order = new_order(long=10**6)
    order.add("long", "long", 0.0)
    order.add("short", "short", 0.0)
    assert order.first(0.0) == "short"
    book.charge("short", 10**7)
    assert order.first(MAX_WAIT_S) == "short"
    assert order.in_order(MAX_WAIT_S) == ["short", "long"]
    assert order.pop(MAX_WAIT_S) == "short"
    assert order.pop(MAX_WAIT_S) == "long"


def test_one_that_enters_may_be_the_next() -> None:
    _, order = new_order(long=10**6)
    order.add("long", "long", 0.0)
    assert order.first(0.0) == "long"
    order.add("short", "short", 0.0)
    assert order.first(0.0) == "short"


def test_one_that_is_put_back_has_its_place_and_its_time() -> None:
    _, order = new_order(a=10**6, b=10**6)
    ticket = order.add("a", "a", 0.0)
    order.add("b", "b", 5.0)
    order.add("c", None, 5.0)
    assert order.discard("a")
    order.put_back("a", ticket)
    assert order.in_order(5.0) == ["c", "a", "b"]
    assert order.in_order(MAX_WAIT_S) == ["a", "c", "b"]
    with pytest.raises(ValueError, match="waits already"):
        order.put_back("a", ticket)
    with pytest.raises(ValueError, match="waits already"):
        order.add("a", "a", 5.0)


def test_one_that_is_gone_is_not_given() -> None:
    _, order = new_order()
    for item in "abcd":
        order.add(item, None, 0.0)
    assert order.first(0.0) == "a"
    assert order.discard("a")
    assert order.discard("c")
    assert not order.discard("c")
    assert ("c" in order, "d" in order) == (False, True)
    assert drain(order) == ["b", "d"]
    for take in (order.first, order.pop):
        with pytest.raises(IndexError):
            take(0.0)


def test_a_bound_of_no_time_is_an_order_by_arrival() -> None:
    book = ServiceBook()
    order: ServiceOrder[str] = ServiceOrder(book, max_wait_s=0.0)
    for item in "cab":
        book.charge(item, 10 ** (ord(item) - 90))
        order.add(item, item, 0.0)
    assert drain(order) == ["c", "a", "b"]


def test_the_turn_of_a_long_program_is_taken_while_short_ones_keep_coming() -> None:
    """A new session arrives before each pop: without the bound the long one would never go."""
    _, order = new_order(long=10**9)
    order.add("first", None, 0.0)
    order.add("long", "long", 0.0)
    now_s, taken = 0.0, order.first(0.0)
    while taken != "long":
        now_s += 0.5
        order.add(f"short-{now_s}", f"short-{now_s}", now_s)
        taken = order.pop(now_s)
    assert now_s == MAX_WAIT_S


def test_what_is_gone_does_not_pile_up_behind_one_that_waits() -> None:
    """One turn waits at the top of each heap while others come and go behind it."""
    _, order = new_order(later=10**9)
    order.add("stays", None, 0.0)
    for number in range(10_000):
        order.add(f"goes-{number}", "later", 0.0)
        assert order.first(0.0) == "stays"
        order.discard(f"goes-{number}")
        assert max(len(order._by_service), len(order._by_arrival)) <= SLACK + 2
    assert drain(order) == ["stays"]


def test_the_help_text_names_the_bound() -> None:
    (text,) = (option.help for option in OPTIONS if option.field == "order")
    assert f" {MAX_WAIT_S:.0f} s " in text


# ---- against a list that is sorted again each time -------------------------------------------


class SortedTurns:
    """The same order, told plainly."""

    def __init__(self, book: ServiceBook) -> None:
        self.book = book
        self.tickets: dict[int, Ticket] = {}
        self.frozen: int | None = None

    def in_order(self, now_s: float) -> list[int]:
        def key(item: int) -> Any:
            ticket = self.tickets[item]
            if now_s - ticket.since_s >= MAX_WAIT_S:
                return (0, ticket.number)
            return (1, self.book.level(ticket.session), ticket.number)

        found = sorted(self.tickets, key=key)
        if self.frozen is not None:
            found.remove(self.frozen)
            found.insert(0, self.frozen)
        return found


PROGRAMS = st.sampled_from([None, "a", "b", "c", "d"])
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), PROGRAMS),
        st.tuples(st.just("charge"), PROGRAMS, st.sampled_from([1, 3000, 50_000, 10**6])),
        st.tuples(st.just("time"), st.sampled_from([0.1, 5.0, MAX_WAIT_S])),
        st.tuples(st.sampled_from(["look", "pop"])),
        st.tuples(st.sampled_from(["discard", "put back"]), st.integers(0, 50)),
    ),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(events=EVENTS)
def test_any_events_give_the_order_of_a_sorted_list(events: list[tuple[Any, ...]]) -> None:
    book = ServiceBook()
    order: ServiceOrder[int] = ServiceOrder(book)
    model = SortedTurns(book)
    gone: dict[int, Ticket] = {}
    now_s = 0.0
    for item, (event, *arguments) in enumerate(events):
        if event == "add":
            model.tickets[item] = order.add(item, arguments[0], now_s)
            model.frozen = None
        elif event == "charge":
            book.charge(*arguments)
        elif event == "time":
            now_s += arguments[0]
        elif event in ("look", "pop") and model.tickets:
            model.frozen = model.in_order(now_s)[0]
            assert order.first(now_s) == model.frozen
            if event == "pop":
                gone[model.frozen] = model.tickets.pop(model.frozen)
                assert order.pop(now_s) == model.frozen
                model.frozen = None
        elif event == "discard" and model.tickets:
            meant = sorted(model.tickets)[arguments[0] % len(model.tickets)]
            gone[meant] = model.tickets.pop(meant)
            assert order.discard(meant)
            model.frozen = None if model.frozen == meant else model.frozen
        elif event == "put back" and gone:
            meant = sorted(gone)[arguments[0] % len(gone)]
            order.put_back(meant, gone[meant])
            model.tickets[meant] = gone.pop(meant)
            model.frozen = None
        assert order.in_order(now_s) == model.in_order(now_s)
        assert len(order) == len(model.tickets)
    while model.tickets:
        model.frozen = model.in_order(now_s)[0]
        assert order.pop(now_s) == model.frozen
        del model.tickets[model.frozen]
        model.frozen = None
