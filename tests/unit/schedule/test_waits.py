# SPDX-License-Identifier: Apache-2.0
"""What sessions that come back, or do not, teach."""

from vllm_stateful.schedule.gaps import LOST_S, Wait, WaitKind
from vllm_stateful.schedule.waits import WaitBook

TOOL, USER = Wait(WaitKind.TOOL, "grep"), Wait(WaitKind.USER)


def worth(book: WaitBook, wait: Wait = TOOL, age_s: float = 0.0) -> float:
    """Of a session that is new."""
    return book.gaps.forecast("t", wait).rate(age_s)


def test_a_gap_is_the_time_from_the_end_of_a_turn_to_the_next() -> None:
    book = WaitBook()
    before = worth(book, age_s=40.0)
    for number in range(30):
        book.began("s", "t", TOOL, 100.0 * number)
        book.came_back("s", 100.0 * number + 50.0)
    assert worth(book, age_s=40.0) > before


def test_a_session_that_does_not_wait_teaches_nothing() -> None:
    book = WaitBook()
    book.came_back("s", 5.0)
    book.began("s", "t", TOOL, 10.0)
    book.came_back("s", 11.0)
    once = worth(book)
    book.came_back("s", 5000.0)
    assert worth(book) == once
    assert len(book) == 1


def test_silence_counts_as_lost_until_the_session_speaks() -> None:
    book, late = WaitBook(), WaitBook()
    for number in range(20):
        for each in (book, late):
            each.began(number, "t", USER, float(number))
    for each in (book, late):
        each.began("other", "t", TOOL, LOST_S + 100.0)
    lost = worth(book, USER, 7000.0)
    assert lost < worth(WaitBook(), USER, 7000.0)
    for number in range(20):
        late.came_back(number, LOST_S + 200.0)
    assert worth(late, USER, 7000.0) > lost


def test_a_closed_session_is_lost_at_once() -> None:
    book = WaitBook()
    before = worth(book, USER)
    for number in range(20):
        book.began(number, "t", USER, 0.0)
        book.closed(number)
    assert worth(book, USER) < before
    assert len(book) == 0
    book.closed("stranger")


def test_a_clock_that_goes_back_is_no_gap() -> None:
    book = WaitBook()
    book.began("s", "t", TOOL, 10.0)
    book.came_back("s", 9.0)
    assert worth(book) > 0


def test_memory_is_bounded() -> None:
    book = WaitBook(max_sessions=10)
    for number in range(100):
        book.began(number, "t", TOOL, float(number))
    assert len(book) == 10
    book.came_back(5, 200.0)
    book.came_back(95, 200.0)
