# SPDX-License-Identifier: Apache-2.0
"""What is drafted from which places, how long, and what is learned of it."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from vllm_stateful.speculate.answer_buffer import LEAD_TOKENS
from vllm_stateful.speculate.drafts import MAX_DRAFT, NO_DRAFT, Acceptance, Draft, Text, draft_of
from vllm_stateful.speculate.earlier_answers import EarlierAnswers
from vllm_stateful.speculate.lookup_index import LookupIndex
from vllm_stateful.types import TokenArray


def array(*tokens: int) -> TokenArray:
    return np.array(tokens, np.int32)


def text_of(*tokens: int) -> Text:
    index = LookupIndex()
    index.extend(array(*tokens))
    return Text(index.tokens, index.find())


def draft(*tokens: int, least_chance: float = 0.0, max_tokens: int = MAX_DRAFT) -> list[int]:
    made = draft_of(text_of(*tokens), Acceptance(), least_chance, max_tokens=max_tokens)
    return made.tokens.tolist()


def test_it_goes_on_as_the_text_did_before_up_to_the_limit() -> None:
    text = [*range(10, 60), 1, 2, 3, 4, 5, 6, 7, 8, *range(70, 80), 1, 2, 3]
    assert draft(*text)[:5] == [4, 5, 6, 7, 8]
    assert draft(*text, max_tokens=3) == [4, 5, 6]
    assert draft(*text, max_tokens=0) == []


def test_a_text_that_repeats_itself_goes_on_repeating() -> None:
    assert draft(1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, max_tokens=9) == [4, 1, 2, 3, 4, 1, 2, 3, 4]


def test_a_longer_match_counts_more_than_a_newer_one() -> None:
    assert draft(9, 8, 1, 2, 3, 5, 0, 1, 2, 3, 6, 9, 8, 1, 2, 3, max_tokens=1) == [5]


def test_of_equal_matches_the_majority_counts_and_then_the_newest() -> None:
    once, twice = [1, 2, 3, 5], [1, 2, 3, 6]
    assert draft(*once, 90, *twice, 91, *once, 92, 1, 2, 3, max_tokens=1) == [5]
    assert draft(*once, 90, *twice, 91, 1, 2, 3, max_tokens=1) == [6]


def test_new_text_has_no_draft() -> None:
    assert draft(*range(50)) == []
    assert draft() == []


def test_nothing_is_drafted_that_is_not_worth_it() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 90, 1, 2, 3]
    lengths = [len(draft(*text, least_chance=least)) for least in (1.1, 0.3, 0.1, 0.0)]
    assert lengths[0] == 0
    assert lengths == sorted(lengths)
    assert lengths[-1] == MAX_DRAFT


def test_what_is_accepted_makes_drafts_longer_and_what_is_not_ends_them() -> None:
    text = text_of(1, 2, 3, 4, 5, 6, 7, 8, 9, 90, 1, 2, 3)
    acceptance = Acceptance()
    first = draft_of(text, acceptance, 0.2)
    for _ in range(100):
        made = draft_of(text, acceptance, 0.2)
        assert acceptance.saw(made, made.tokens) == len(made.tokens)
    assert len(draft_of(text, acceptance, 0.2).tokens) > len(first.tokens)
    for _ in range(500):
        assert acceptance.saw(draft_of(text, acceptance, 0.0), array(99)) == 0
    assert draft_of(text, acceptance, 0.2) is NO_DRAFT


def test_tokens_behind_the_first_rejected_one_teach_nothing() -> None:
    acceptance = Acceptance()
    before = acceptance.rates.copy()
    draft = Draft(array(5, 6, 7), array(0, 1, 2), 0.5)
    assert acceptance.saw(draft, array(5, 9)) == 1
    assert acceptance.rates[0] > before[0]
    assert acceptance.rates[1] < before[1]
    assert acceptance.rates[2] == before[2]


def test_tokens_that_were_not_verified_teach_nothing() -> None:
    """A draft that was cut, or whose answer ended."""
    acceptance = Acceptance()
    before = acceptance.rates.copy()
    assert acceptance.saw(Draft(array(5, 6, 7), array(0, 1, 2), 0.5), array(5)) == 1
    assert acceptance.rates[0] > before[0]
    assert acceptance.rates[1:].tolist() == before[1:].tolist()
    assert acceptance.saw(NO_DRAFT, array(5)) == 0


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 8))
def test_each_token_follows_some_place_that_agrees_so_far(text: list[int], most: int) -> None:
    own = text_of(*text)
    made = draft_of(own, Acceptance(), 0.0, max_tokens=most).tokens.tolist()
    endless = text + made
    ways = [endless[place : place + len(made)] for place in own.found.places.tolist()]
    assert (made in ways) if made else (not ways or most == 0)


# ---- earlier answers of the same agent -------------------------------------------------------


def test_an_agent_is_drafted_what_it_said_in_another_session() -> None:
    store = EarlierAnswers(1 << 20)
    store.add("agent", array(1, 2, 3, 4, 5, 6, 7), array(40, 41, 42, 43, 44))
    session = array(90, 91, 5, 6, 7)
    index = store.of("agent")
    assert index is not None
    others = Text(index.tokens, index.find_end_of(session, len(session)))
    own = text_of(*session.tolist())
    made = draft_of(own, Acceptance(), 0.0, others=others)
    assert made.tokens.tolist() == [40, 41, 42, 43, 44]
    assert store.of("another") is None


def test_only_the_newer_answers_of_an_agent_are_kept() -> None:
    store = EarlierAnswers(1 << 20, max_tokens=100)
    for n in range(50):
        store.add("agent", array(), array(*[n] * 10))
    index = store.of("agent")
    assert index is not None
    assert len(index) <= 100
    kept = index.tokens.tolist()
    assert kept == sorted(kept)
    assert kept[-1] == 49
    store.add("agent", array(), array(*range(1000)))
    assert len(index_of(store)) == 100


def index_of(store: EarlierAnswers) -> LookupIndex:
    index = store.of("agent")
    assert index is not None
    return index


def test_the_agent_that_was_used_longest_ago_is_forgotten() -> None:
    store = EarlierAnswers(3 * LookupIndex().num_bytes)
    for n in range(3):
        store.add(n, array(), array(1, 2, 3))
    store.of(0)
    store.add(3, array(), array(1, 2, 3))
    assert [n for n in range(4) if store.of(n) is not None] == [0, 2, 3]
    assert store.num_bytes == 3 * LookupIndex().num_bytes


def test_an_answer_is_kept_with_the_end_of_its_prompt() -> None:
    store = EarlierAnswers(1 << 20)
    store.add("agent", array(*range(20)), array(50))
    assert index_of(store).tokens.tolist() == [*range(20)[-LEAD_TOKENS:], 50]
