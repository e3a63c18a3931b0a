# SPDX-License-Identifier: Apache-2.0
"""The reason for what a turn computes again, from what was found and the session's story."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from vllm_stateful.session import Cause, Found, SessionBook, TurnRecord, why_not_more
from vllm_stateful.types import Demotion, Identity, SessionKey, Shape

SESSION = SessionKey(Identity(), "session-one")


def book(frontier: int = 100, gone: Demotion | None = None) -> SessionBook:
    """A session with one turn, of which so many tokens were left."""
    made = SessionBook()
    made.admitted(TurnRecord("request-1", SESSION, 0.0), None, 1.0)
    made.ended(SESSION, frontier, 2.0)
    if gone is not None:
        made.demoted(SESSION, gone, 0, 12.0)
    return made


@pytest.mark.parametrize(
    ("found", "gone", "cause", "num_tokens"),
    [
        (Found(150, 100, 100, 100, True), None, Cause.NONE, 0),
        (Found(150, 40, 40, 100, True), None, Cause.CHANGED, 60),
        (Found(150, 32, 40, 100, True), None, Cause.CHANGED, 68),
        (Found(150, 0), Demotion.PRESSURE, Cause.EVICTED, 100),
        (Found(150, 64, 64, 64, True), Demotion.BUDGET, Cause.EVICTED, 36),
        (Found(150, 96), Demotion.IDLE, Cause.EVICTED, 4),
        (Found(150, 0), None, Cause.EVICTED, 100),
        (Found(150, 64, 100, 100, True, has_points=True), None, Cause.SNAPSHOT_MISSING, 36),
        (Found(150, 0, 0, 0, has_points=True), None, Cause.SNAPSHOT_MISSING, 100),
        (Found(150, 99, 100, 100, True, slack=1), None, Cause.NONE, 0),
        (Found(60, 59, 59, 100, True), None, Cause.NONE, 0),
    ],
)
def test_the_reason(found: Found, gone: Demotion | None, cause: Cause, num_tokens: int) -> None:
    missed = why_not_more(SESSION, found, book(gone=gone), 20.0)
    assert (missed.cause, missed.num_tokens) == (cause, num_tokens)
    if gone is not None:
        assert (missed.why_gone, missed.gone_s, missed.idle_s) == (str(gone), 8.0, 10.0)


def test_without_resume_points_none_is_missing() -> None:
    """Three tokens in common are too few to be worth a copy, with full attention too."""
    assert why_not_more(SESSION, Found(150, 0, 3, 100, True), book(), 20.0).num_behind_snapshot == 0
    found = Found(150, 0, 3, 100, True, has_points=True)
    assert why_not_more(SESSION, found, book(), 20.0).num_behind_snapshot == 3


@pytest.mark.parametrize(
    ("identity", "cause"),
    [
        (Identity(), Cause.NEVER_SEEN),
        (Identity("salt"), Cause.OTHER_SALT),
        (Identity(None, ("adapter",)), Cause.OTHER_LORA),
        (Identity(f"vllm-stateful.{'a' * 16}.{'0' * 64}"), Cause.OTHER_TENANT),
    ],
)
def test_a_first_turn_says_who_else_has_its_id(identity: Identity, cause: Cause) -> None:
    known = SessionBook() if cause is Cause.NEVER_SEEN else book()
    missed = why_not_more(SessionKey(identity, SESSION.session_id), Found(150, 0), known, 20.0)
    assert (missed.cause, missed.num_tokens) == (cause, 0)


@pytest.mark.parametrize(
    ("before", "now", "cause"),
    [
        ([Shape.TOOLS], Shape.BARE, Cause.SIDE_REQUEST),
        ([Shape.TOOLS, Shape.OTHER], Shape.BARE, Cause.SIDE_REQUEST),
        ([Shape.BARE, Shape.OTHER], Shape.BARE, Cause.EVICTED),
        ([Shape.BARE], Shape.BARE, Cause.EVICTED),
        ([Shape.BARE], Shape.TOOLS, Cause.NEVER_SEEN),
        ([Shape.OTHER], Shape.TOOLS, Cause.EVICTED),
        ([Shape.TOOLS], Shape.OTHER, Cause.EVICTED),
    ],
)
def test_requests_on_the_side_are_no_part_of_the_history(
    before: list[Shape], now: Shape, cause: Cause
) -> None:
    known = SessionBook()
    for shape in before:
        known.admitted(TurnRecord("request-1", SESSION, 0.0), None, 1.0, shape)
        known.ended(SESSION, 100, 2.0)
    assert why_not_more(SESSION, Found(150, 0, shape=now), known, 20.0).cause is cause


@given(
    st.integers(1, 200),
    st.integers(0, 200),
    st.integers(0, 200),
    st.integers(0, 200),
    st.booleans(),
    st.booleans(),
    st.none() | st.sampled_from(Demotion),
)
def test_no_more_is_missed_than_was_computed_and_is_asked_for(
    num_prompt: int,
    num_reused: int,
    num_shared: int,
    num_history: int,
    is_own: bool,
    has_points: bool,
    gone: Demotion | None,
) -> None:
    num_shared = min(num_shared, num_history, num_prompt - 1)
    num_reused = min(num_reused, num_prompt - 1)
    found = Found(num_prompt, num_reused, num_shared, num_history, is_own, 0, has_points)
    missed = why_not_more(SESSION, found, book(100, gone), 20.0)
    assert (
        0
        <= missed.num_tokens
        <= min(max(100, num_history), num_prompt - 1)
        - min(num_reused, max(100, num_history), num_prompt - 1)
    )
    assert (missed.cause is Cause.CHANGED) == (missed.token is not None)
    if missed.num_tokens:
        assert missed.cause is not Cause.NONE
