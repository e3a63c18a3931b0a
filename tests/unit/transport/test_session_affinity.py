# SPDX-License-Identifier: Apache-2.0
"""Which of several engine cores a turn goes to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_stateful.transport import session_affinity
from vllm_stateful.transport.prompt_ids import PromptTokenIds
from vllm_stateful.transport.session_affinity import (
    MOST_OUTWEIGHED,
    SLACK,
    TOKENS_PER_REQUEST,
    Choice,
    SessionAffinity,
)

ENGINES = (b"0", b"1", b"2")
IDLE = dict.fromkeys(ENGINES, 0.0)


def prompt(
    length: int, version: int = 0, parent: int = 0, shared: int = 0, *, ends: bool = True
) -> PromptTokenIds:
    return PromptTokenIds(
        range(length), version=version, parent=parent, num_parent_tokens=shared, parent_ends=ends
    )


@pytest.fixture
def alone() -> SessionAffinity:
    """One API server. Prompt 1, 100 tokens, went to engine 2."""
    affinity = SessionAffinity(is_shared=False)
    affinity.went("first", prompt(100, 1), b"2")
    return affinity


def test_what_nothing_is_known_of_is_left_to_vllm(alone: SessionAffinity) -> None:
    assert alone.choose("r", prompt(50, 7), None, IDLE) == (None, Choice.NEW)
    assert alone.choose("r", prompt(50, 7), "name", IDLE) == (None, Choice.NEW)
    assert alone.choose("r", [1, 2, 3], None, IDLE) == (None, Choice.NEW)
    assert alone.choose("r", None, None, IDLE) == (None, Choice.NEW)


def test_a_continuation_goes_where_its_prompt_went(alone: SessionAffinity) -> None:
    assert alone.choose("r", prompt(130, 2, 1, 100), None, IDLE) == (b"2", Choice.HOME)


def test_the_same_prompt_goes_there_again(alone: SessionAffinity) -> None:
    assert alone.choose("r", prompt(100, 1), None, IDLE) == (b"2", Choice.HOME)


def test_who_only_shares_a_beginning_is_free(alone: SessionAffinity) -> None:
    sibling = prompt(130, 2, 1, 90, ends=False)
    assert alone.choose("r", sibling, None, IDLE) == (None, Choice.NEW)


def test_a_name_finds_a_conversation_whose_history_changed(alone: SessionAffinity) -> None:
    alone.choose("a", prompt(100, 5), "name", IDLE)
    alone.went("a", prompt(100, 5), b"1")
    edited = prompt(120, 6, 5, 20, ends=False)
    assert alone.choose("b", edited, "name", IDLE) == (b"1", Choice.HOME)
    assert alone.choose("c", edited, "other", IDLE) == (None, Choice.NEW)


def test_a_name_follows_the_conversation(alone: SessionAffinity) -> None:
    for request, engine in (("a", b"1"), ("b", b"0")):
        alone.choose(request, None, "name", IDLE)
        alone.went(request, None, engine)
    assert alone.choose("c", None, "name", IDLE) == (b"0", Choice.HOME)


def test_an_engine_that_is_gone_is_no_home(alone: SessionAffinity) -> None:
    left = {b"0": 0.0, b"1": 0.0}
    assert alone.choose("r", prompt(130, 2, 1, 100), None, left) == (None, Choice.NEW)


@pytest.mark.parametrize(
    ("num_tokens", "outweighed"),
    [
        (0, 0),
        (TOKENS_PER_REQUEST, 1),
        (10 * TOKENS_PER_REQUEST, 10),
        (1000 * TOKENS_PER_REQUEST, MOST_OUTWEIGHED),
    ],
)
def test_a_longer_context_bears_a_longer_queue(num_tokens: int, outweighed: int) -> None:
    affinity = SessionAffinity(is_shared=False)
    affinity.went("first", prompt(num_tokens, 1), b"2")
    turn = prompt(num_tokens + 5, 2, 1, num_tokens)
    for more, home in ((0.0, True), (0.1, False)):
        # Two engines that are idle, so that the mean is small.
        loads = {f"idle{i}".encode(): 0.0 for i in range(99)} | {b"2": SLACK + outweighed + more}
        expected = (b"2", Choice.HOME) if home else (None, Choice.MOVED)
        assert affinity.choose("r", turn, None, loads) == expected


def test_under_load_a_share_of_the_mean_is_borne() -> None:
    affinity = SessionAffinity(is_shared=False)
    affinity.choose("a", None, "name", IDLE)
    affinity.went("a", None, b"0")
    assert affinity.choose("b", None, "name", {b"0": 48.0, b"1": 40.0}).engine == b"0"
    assert affinity.choose("b", None, "name", {b"0": 55.0, b"1": 40.0}).engine is None


def test_api_servers_agree_on_a_name_without_talking() -> None:
    servers = [SessionAffinity(is_shared=True) for _ in range(3)]
    chosen = [
        [server.choose("r", None, f"name {i}", IDLE) for i in range(60)] for server in servers
    ]
    assert chosen[0] == chosen[1] == chosen[2]
    assert {choice.why for choice in chosen[0]} == {Choice.HASHED}
    counts = [sum(choice.engine == engine for choice in chosen[0]) for engine in ENGINES]
    assert min(counts) >= 10


def test_a_new_engine_takes_only_its_share_of_the_names() -> None:
    affinity = SessionAffinity(is_shared=True)
    names = [f"name {i}" for i in range(300)]
    before = [affinity.choose("r", None, name, IDLE).engine for name in names]
    after = [affinity.choose("r", None, name, {**IDLE, b"3": 0.0}).engine for name in names]
    moved = [now for was, now in zip(before, after, strict=True) if was != now]
    assert set(moved) == {b"3"}
    assert 40 <= len(moved) <= 110


def test_without_a_name_several_api_servers_choose_by_what_they_sent() -> None:
    affinity = SessionAffinity(is_shared=True)
    affinity.went("first", prompt(100, 1), b"2")
    assert affinity.choose("r", prompt(130, 2, 1, 100), None, IDLE) == (b"2", Choice.HOME)
    assert affinity.choose("r", prompt(130, 3), None, IDLE) == (None, Choice.NEW)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_affinity, "MAX_KNOWN", 2)
    affinity = SessionAffinity(is_shared=False)
    for i in range(1, 5):
        affinity.choose(f"r{i}", prompt(9, i), f"name {i}", IDLE)
        affinity.went(f"r{i}", prompt(9, i), b"0")
        affinity.choose(f"never sent {i}", None, f"name {i}", IDLE)
    known = [affinity.choose("r", None, f"name {i}", IDLE).why for i in range(1, 5)]
    assert known == [Choice.NEW, Choice.NEW, Choice.HOME, Choice.HOME]
    assert len(affinity._prompts) == len(affinity._conversations) == len(affinity._names) == 2


@given(
    turns=st.lists(
        st.tuples(st.integers(0, 5), st.lists(st.floats(0, 50), min_size=3, max_size=3)),
        max_size=40,
    ),
    is_shared=st.booleans(),
)
def test_a_chosen_engine_is_the_last_or_the_hashed_one_and_never_overloaded(
    turns: list[tuple[int, list[float]]], is_shared: bool
) -> None:
    """Against a naive model: a dictionary from the name to where it last went."""
    affinity, last = SessionAffinity(is_shared=is_shared), dict[str, bytes]()
    for number, (name_number, numbers) in enumerate(turns):
        name, loads = f"name {name_number}", dict(zip(ENGINES, numbers, strict=True))
        engine, why = affinity.choose(f"r{number}", [0] * 10, name, loads)
        if why is Choice.HOME:
            assert engine == last[name]
        else:
            assert why is (Choice.MOVED if name in last or is_shared else Choice.NEW) or (
                is_shared and name not in last and why is Choice.HASHED
            )
        if engine is not None:
            mean = sum(numbers) / 3
            assert loads[engine] <= min(numbers) + max(SLACK, 0.25 * mean) + 0.01
        went = engine if engine is not None else min(loads, key=lambda each: loads[each])
        affinity.went(f"r{number}", [0] * 10, went)
        last[name] = went
