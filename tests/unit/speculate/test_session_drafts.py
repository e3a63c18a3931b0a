# SPDX-License-Identifier: Apache-2.0
"""Indexes that live from turn to turn, and who may be drafted what."""

import numpy as np

from vllm_stateful.speculate.lookup_index import LookupIndex
from vllm_stateful.speculate.session_drafts import SessionDrafts
from vllm_stateful.types import TokenArray


def array(*tokens: int) -> TokenArray:
    return np.array(tokens, np.int32)


def turn(drafts: SessionDrafts, name: str, prompt: list[int], answer: list[int]) -> None:
    drafts.begins(name, "session", "agent", array(*prompt))
    drafts.came(name, array(*answer))
    drafts.ends(name)


def test_an_index_is_given_up_with_age_or_when_its_session_is_over() -> None:
    drafts = SessionDrafts(1 << 20)
    for number, session in enumerate(("one", "two", "three")):
        drafts.begins(session, session, "agent", np.arange(40, dtype=np.int32))
        drafts.ends(session, 10.0 * number)
    drafts.forget_before(10.0)
    assert drafts.waiting() == ["two", "three"]
    assert drafts.forget("two") is not None
    assert drafts.forget("two") is None
    drafts.forget("three")
    assert drafts._num_bytes == 0


def test_a_turn_is_drafted_what_stands_in_its_prompt() -> None:
    drafts = SessionDrafts(1 << 20)
    drafts.begins("a", "session", "agent", array(1, 2, 3, 4, 5, 6, 7, 90, 1, 2, 3))
    assert drafts.draft("a", 0.0, 4).tolist() == [4, 5, 6, 7]
    drafts.came("a", array(4, 5, 80))
    assert (drafts.num_drafted, drafts.num_accepted) == (4, 2)
    assert drafts.draft("a", 0.0).tolist() == []
    drafts.came("a", array(81))
    assert drafts.num_tokens("a") == 15


def test_the_next_turn_goes_on_with_the_index_of_its_session() -> None:
    drafts = SessionDrafts(1 << 20)
    turn(drafts, "a", [1, 2, 3, 4], [5, 6])
    index = drafts._waiting["session"].known
    drafts.begins("b", "session", "agent", array(1, 2, 3, 4, 5, 6, 7))
    assert drafts._running["b"].index is index
    assert index.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert not drafts._waiting


def test_an_edited_history_loses_what_it_no_longer_has() -> None:
    drafts = SessionDrafts(1 << 20)
    turn(drafts, "a", [1, 2, 3, 4], [5, 6])
    drafts.begins("b", "session", "agent", array(1, 2, 9))
    assert drafts._running["b"].index.tokens.tolist() == [1, 2, 9]


def test_two_turns_of_a_session_at_once_do_not_meet() -> None:
    drafts = SessionDrafts(1 << 20)
    drafts.begins("a", "session", "agent", array(1, 2, 3))
    drafts.begins("b", "session", "agent", array(7, 8, 9))
    drafts.came("a", array(4))
    drafts.came("b", array(5))
    assert drafts._running["a"].index.tokens.tolist() == [1, 2, 3, 4]
    drafts.ends("a")
    drafts.ends("b")
    drafts.ends("b")
    assert drafts._waiting["session"].known.tokens.tolist() == [7, 8, 9, 5]
    assert drafts._num_bytes == drafts._waiting["session"].known.num_bytes


def test_an_agent_is_drafted_its_own_earlier_answers_only() -> None:
    drafts = SessionDrafts(1 << 20)
    turn(drafts, "a", [1, 2, 3], [4, 5, 6, 7, 8])
    drafts.begins("b", "another-session", "agent", array(50, 1, 2, 3))
    drafts.begins("c", "a-third-session", "another-agent", array(50, 1, 2, 3))
    assert drafts.draft("b", 0.0).tolist() == [4, 5, 6, 7, 8]
    assert drafts.draft("c", 0.0).tolist() == []


def test_memory_is_bounded_and_what_waits_longest_goes() -> None:
    drafts = SessionDrafts(2 * LookupIndex().num_bytes)
    for n in range(4):
        drafts.begins(n, f"session-{n}", n, array(1, 2, 3))
        drafts.ends(n)
    assert list(drafts._waiting) == ["session-2", "session-3"]


def test_what_is_learned_of_agents_is_bounded() -> None:
    drafts = SessionDrafts(1 << 20)
    for n in range(500):
        drafts.begins(n, "session", n, array(1, 2, 3, 1, 2, 3))
        drafts.draft(n, 0.0)
        drafts.ends(n)
    assert len(drafts._acceptance) <= 66
