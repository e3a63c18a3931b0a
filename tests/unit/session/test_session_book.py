# SPDX-License-Identifier: Apache-2.0
"""Stories of sessions and records of turns: bounded, and as a plain list would have them."""

import sys
from collections import OrderedDict
from typing import Any

import hypothesis.strategies as st
from hypothesis import given

from vllm_stateful.session import Cause, Missed, Said, SessionBook, TurnLog, TurnRecord
from vllm_stateful.session.session_book import MAX_CHILDREN, MAX_IDENTITIES
from vllm_stateful.types import Demotion, Identity, SessionKey, Shape

NAMES = st.sampled_from("abcdef")
SALTS = st.sampled_from([None, "salt"])
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("admitted"), NAMES, SALTS, st.none() | NAMES),
        st.tuples(st.just("ended"), NAMES, SALTS, st.integers(0, 50)),
        st.tuples(st.just("given"), NAMES, SALTS, st.sampled_from(Demotion)),
    ),
    max_size=60,
)


def key(name: str, salt: str | None = None) -> SessionKey:
    return SessionKey(Identity(salt), f"session-{name}")


def record(session: SessionKey, number: int) -> TurnRecord:
    return TurnRecord(f"request-{number}", session, 0.0)


@given(EVENTS, st.integers(1, 8))
def test_the_book_is_a_bounded_list_of_stories(events: list[Any], most: int) -> None:
    book = SessionBook(most)
    model: OrderedDict[SessionKey, dict[str, Any]] = OrderedDict()
    for number, (what, name, salt, value) in enumerate(events):
        session = key(name, salt)
        if what == "admitted":
            parent = None if value is None or value == name else key(value, salt)
            book.admitted(record(session, number), parent, float(number))
            known = model.setdefault(session, {"turns": 0, "frontier": 0, "parent": parent})
            known |= {"turns": known["turns"] + 1, "gone": None}
            model.move_to_end(session)
            while len(model) > most:
                model.popitem(last=False)
        elif what == "ended":
            book.ended(session, value, float(number))
            if session in model:
                model[session]["frontier"] = value or model[session]["frontier"]
        else:
            book.demoted(session, value, 0, float(number))
            if session in model and value is not Demotion.SUPERSEDED:
                model[session]["gone"] = value
    assert len(book) == len(model) <= most
    assert [story.session for story in book.newest_first()] == list(reversed(model))
    for session, known in model.items():
        story = book.story(session)
        assert story is not None
        gone = None if story.gone is None else story.gone.why
        assert (story.num_turns, story.frontier) == (known["turns"], known["frontier"])
        assert (story.parent, gone) == (known["parent"], known["gone"])
        assert session.identity in book.identities(session.session_id)
    for name in "abcdef":
        identities = book.identities(f"session-{name}")
        assert set(identities) == {s.identity for s in model if s.session_id == f"session-{name}"}


def test_children_and_identities_are_bounded_too() -> None:
    book = SessionBook()
    book.admitted(record(key("root"), 0), None, 0.0)
    for number in range(MAX_CHILDREN + 10):
        book.admitted(record(key(f"child-{number}"), number), key("root"), 0.0)
        book.admitted(record(key("root", f"salt-{number}"), number), None, 0.0)
    story = book.story(key("root"))
    assert story is not None
    assert len(story.children) == MAX_CHILDREN
    assert story.children[-1] == key(f"child-{MAX_CHILDREN + 9}")
    assert len(book.identities("session-root")) == MAX_IDENTITIES


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 6))
def test_the_log_keeps_the_last_turns(numbers: list[int], most: int) -> None:
    log = TurnLog(most)
    model: OrderedDict[str, TurnRecord] = OrderedDict()
    for number in numbers:
        made = record(key("a"), number)
        log.add(made)
        model[made.request_id] = made
        model.move_to_end(made.request_id)
        while len(model) > most:
            model.popitem(last=False)
    assert list(log.newest_first()) == list(reversed(model.values()))
    assert len(log) == len(model)
    for number in range(10):
        assert log.find(f"request-{number}", None) is model.get(f"request-{number}")
        assert log.find_of_anybody(f"request-{number}") is model.get(f"request-{number}")
    assert not log._of_client


def test_names_of_clients_are_forgotten_with_their_turns() -> None:
    log = TurnLog(10)
    for number in range(100):
        session = key(str(number % 7), f"salt-{number % 3}")
        log.add(TurnRecord(f"chatcmpl-{number % 20}-0-{number:08x}", session, 0.0))
    assert len(log) == 10
    assert set(log._of_client.values()) <= {each.request_id for each in log.newest_first()}
    assert len(log._of_client) <= 20


def test_a_million_turns_take_what_ten_thousand_do() -> None:
    log, book = TurnLog(1000), SessionBook(1000)
    for number in range(100_000):
        made = record(key(str(number)), number)
        log.add(made)
        book.admitted(made, key(str(number - 1)), float(number))
        book.ended(made.session, 100, float(number))
        book.demoted(made.session, Demotion.PRESSURE, 0, float(number))
    assert (len(log), len(book), len(book._identities)) == (1000, 1000, 1000)
    size = sum(sys.getsizeof(getattr(made, name)) for name in TurnRecord.__slots__)
    assert size < 2048


def test_what_came_on_the_side_leaves_the_story_of_the_history() -> None:
    book = SessionBook()
    main = TurnRecord("request-1", key("a"), 0.0, said=Said("codex", window=1))
    session = main.session
    book.admitted(main, None, 1.0, Shape.TOOLS)
    book.ended(session, 100, 2.0)
    book.demoted(session, Demotion.PRESSURE, 0, 3.0)
    side = TurnRecord("request-2", session, 0.0, missed=Missed(Cause.SIDE_REQUEST))
    book.admitted(side, None, 4.0, Shape.BARE)
    book.ended(session, 20, 5.0, is_kept=True, is_beside=True)
    story = book.story(session)
    assert story is not None
    assert story.gone is not None
    assert (story.frontier, story.gone.why, story.window) == (100, Demotion.PRESSURE, 1)
    later = TurnRecord("request-3", session, 0.0, said=Said("codex", window=2))
    book.admitted(later, None, 6.0, Shape.TOOLS)
    assert (later.window_before, side.window_before, story.window) == (1, None, 2)
