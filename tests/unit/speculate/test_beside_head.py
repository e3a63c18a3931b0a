# SPDX-License-Identifier: Apache-2.0
"""The choice between a head's draft and the session's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_stateful.speculate import drafts as drafts_module
from vllm_stateful.speculate.beside_head import BesideHead
from vllm_stateful.speculate.session_drafts import SessionDrafts, compile_now
from vllm_stateful.types import TokenArray


def array(*tokens: int) -> TokenArray:
    return np.array(tokens, np.int32)


def test_at_first_a_sure_draft_is_better_and_an_unsure_one_is_not() -> None:
    choice = BesideHead(4)
    assert choice.is_better(3.9)
    assert not choice.is_better(1.0)


def test_the_better_one_is_learned_whichever_is_verified() -> None:
    choice = BesideHead(3)
    for _ in range(20):
        choice.saw(1.0, 1, 0, is_session=False)
    assert choice.is_better(1.0)
    assert choice.is_better(2.9), "another kind of draft is not touched"
    for _ in range(20):
        choice.saw(2.9, 2, 3, is_session=True)
    assert not choice.is_better(2.9)


def test_looks_that_bring_nothing_do_not_pay() -> None:
    choice = BesideHead(3)
    assert choice.pays(50e-6, 5e-3)
    for _ in range(400):
        choice.saw_nothing()
    assert not choice.pays(50e-6, 5e-3)
    for _ in range(3):
        choice.saw(2.9, 3, 1, is_session=True)
    assert choice.pays(50e-6, 5e-3)


@given(st.floats(-1, 100), st.integers(1, 32))
def test_any_expectation_is_of_some_kind(expected: float, num_tokens: int) -> None:
    choice = BesideHead(num_tokens)
    choice.saw(expected, 1, 0, is_session=True)
    choice.is_better(expected)


def new_turn(num_head_tokens: int = 3) -> SessionDrafts:
    drafts = SessionDrafts(1 << 20, num_head_tokens)
    drafts.begins("a", "session", "agent", np.tile(np.arange(40, dtype=np.int32), 2)[:70])
    return drafts


def test_what_the_session_repeats_takes_the_heads_place_and_is_counted() -> None:
    drafts = new_turn()
    assert drafts.draft_beside("a", array(90, 91, 92)).tolist() == [30, 31, 32]
    drafts.came("a", array(30, 31, 80))
    assert (drafts.num_drafted, drafts.num_accepted) == (3, 2)


def test_the_heads_draft_stays_where_it_was_right_more_often_and_is_not_counted() -> None:
    drafts = new_turn()
    assert drafts.beside is not None
    for _ in range(30):
        for expected in np.arange(0.0, 3.0, 0.1):
            drafts.beside.saw(float(expected), 0, 3, is_session=False)
    assert drafts.draft_beside("a", array(90, 91, 92)).tolist() == [90, 91, 92]
    drafts.came("a", array(90, 91, 80))
    assert (drafts.num_drafted, drafts.num_accepted) == (0, 0)


def test_a_short_draft_goes_on_with_what_the_head_has_there() -> None:
    drafts = SessionDrafts(1 << 20, 3)
    drafts.begins("earlier", "one", "agent", array(*range(20)))
    drafts.came("earlier", array(50, 51, 52, 53, 54, 55))
    drafts.ends("earlier")
    drafts.begins("a", "two", "agent", array(*range(20), 50, 51, 52, 53, 54))
    assert drafts.beside is not None
    for expected in (0.2, 0.5, 0.8):
        drafts.beside.saw(expected, 90, 0, is_session=True)
    assert drafts.draft_beside("a", array(90, 91, 92)).tolist() == [55, 91, 92]


def test_new_text_is_left_to_the_head() -> None:
    drafts = SessionDrafts(1 << 20, 3)
    drafts.begins("a", "session", "agent", array(*range(20)))
    assert drafts.draft_beside("a", array(90, 91, 92)).tolist() == [90, 91, 92]
    drafts.came("a", array(90))
    drafts.withdraw("a")
    assert (drafts.num_drafted, drafts.num_accepted) == (0, 0)


def test_a_withdrawn_draft_teaches_nothing() -> None:
    drafts, choice = new_turn(), BesideHead(3)
    drafts.draft_beside("a", array(90, 91, 92))
    drafts.withdraw("a")
    drafts.came("a", array(1, 2, 3))
    assert drafts.beside is not None
    np.testing.assert_array_equal(drafts.beside._margins, choice._margins)
    assert drafts.num_drafted == 0


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.9, 1.0])
def test_never_worse_than_the_head_in_the_long_run(chance: float) -> None:
    """Texts that repeat themselves half of the time, and a head that is right now and then."""
    random = np.random.default_rng(1)
    once = random.integers(100, 1000, 300)
    text = np.concatenate([once, random.integers(100, 1000, 500), once, once]).astype(np.int32)
    total = {True: 0, False: 0}
    for is_alone in total:
        luck = np.random.default_rng(2)
        drafts = SessionDrafts(1 << 20, 3)
        drafts.begins("a", "session", "agent", text[:1])
        done = 1
        while done < len(text):
            rest = text[done : done + 3]
            head = np.where(luck.random(len(rest)) < chance, rest, -5).astype(np.int32)
            made = drafts.draft_beside("a", head)
            right = int(((head if is_alone else made) == rest).cumprod().sum())
            drafts.came("a", text[done : done + right + 1])
            done += right + 1
            total[is_alone] += 1
    assert total[False] <= total[True] + 3


def test_what_drafts_need_is_compiled_before_the_first_turn() -> None:
    compile_now()
    assert drafts_module._follow.signatures  # type: ignore[attr-defined]
