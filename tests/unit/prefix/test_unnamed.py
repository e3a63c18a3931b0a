# SPDX-License-Identifier: Apache-2.0
"""Conversations that no client named are told apart by what their prompts hold."""

import pytest
from fake_pool import FakeEngine, key
from test_residency_parts import ANSWER, ASK, RULES, SYSTEM, THOUGHTS, message, words

from vllm_stateful.prefix.residency import ANONYMOUS, Residency
from vllm_stateful.schedule.gaps import WaitKind
from vllm_stateful.types import Outcome, SessionKey

FIRST = [*SYSTEM, *message("user", *words(2000, 40)), *ASK]
SECOND = [*message("user", *words(2100, 40)), *ASK]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(rules=RULES)


def unnamed(number: int) -> SessionKey:
    return key(f"{ANONYMOUS}{number}")


def asked(engine: FakeEngine, number: int, prompt: list[int]) -> tuple[Residency, Outcome]:
    turn = engine.start(unnamed(number), prompt)
    made = engine.finish(turn, [*THOUGHTS, *ANSWER], tool="shell")
    assert made is not None
    return made, turn.match.outcome


@pytest.mark.parametrize("kept", [ANSWER, ANSWER[5:], []], ids=["no reasoning", "cut", "no answer"])
def test_an_answer_that_comes_back_changed_is_the_same_conversation(
    kept: list[int], engine: FakeEngine
) -> None:
    first, _ = asked(engine, 1, FIRST)
    assert first.wait is WaitKind.ONE_SHOT
    second, outcome = asked(engine, 2, [*FIRST, *kept, *SECOND])
    assert outcome is Outcome.DIVERGED
    assert second.session == first.session == unnamed(1)
    assert (second.num_turns, second.wait) == (2, WaitKind.TOOL)
    assert first.superseded or not first.alive
    engine.check()


def test_a_model_that_goes_on_as_the_user_asks_nothing(engine: FakeEngine) -> None:
    """With `ignore_eos`, as benchmarks ask, an answer has messages of its own."""
    turn = engine.start(unnamed(1), FIRST)
    goes_on = [*ANSWER, *message("user", *words(9000, 9)), *ASK, *words(9100, 9)]
    first = engine.finish(turn, goes_on)
    assert first is not None
    second, outcome = asked(engine, 2, [*FIRST, *ANSWER[3:], *SECOND])
    assert (second.session, outcome) == (unnamed(1), Outcome.DIVERGED)
    assert first.superseded or not first.alive
    engine.check()


def test_a_reminder_that_the_next_prompt_leaves_out_is_the_same_conversation(
    engine: FakeEngine,
) -> None:
    """One from the first turn on, at the end of each prompt."""
    reminders = [message("user", *words(6000 + 10 * number, 5)) for number in range(3)]
    history = FIRST[: -len(ASK)]
    first, _ = asked(engine, 1, [*history, *reminders[0], *ASK])
    made, num_turns = first, 1
    for number in (1, 2):
        history = [*history, *ASK, *ANSWER[number:], *message("tool", *words(7000, 9))]
        made, outcome = asked(engine, number + 1, [*history, *reminders[number], *ASK])
        num_turns += 1
        assert (made.session, outcome) == (unnamed(1), Outcome.DIVERGED)
        assert made.num_turns == num_turns
    sibling = [*history, *reminders[0], *ASK]
    assert engine.start(unnamed(9), sibling).session == unnamed(9), "asked otherwise, beside it"


def test_parallel_agents_with_one_system_prompt_stay_apart(engine: FakeEngine) -> None:
    """They part inside the question, even if only its last token differs."""
    first, _ = asked(engine, 1, FIRST)
    question = message("user", *words(2000, 39), 9999)
    second, outcome = asked(engine, 2, [*SYSTEM, *question, *ASK])
    assert outcome is Outcome.FORKED
    assert second.session == unnamed(2)
    assert not first.superseded
    again, outcome = asked(engine, 3, [*FIRST, *ANSWER, *SECOND])
    assert (again.session, outcome) == (unnamed(1), Outcome.DIVERGED)


def test_what_is_asked_while_the_conversation_runs_is_another(engine: FakeEngine) -> None:
    asked(engine, 1, FIRST)
    running = engine.start(unnamed(2), [*FIRST, *THOUGHTS, *ANSWER, *SECOND])
    assert running.session == unnamed(1)
    beside = engine.start(unnamed(3), [*FIRST, *SECOND])
    assert beside.session == unnamed(3)
    assert beside.match.outcome is Outcome.FORKED


def test_rollouts_of_one_prompt_stay_apart(engine: FakeEngine) -> None:
    """All were answered before the first of them goes on, and the answers come back changed."""
    running = [engine.start(unnamed(number), FIRST) for number in range(8)]
    for number, turn in enumerate(running):
        assert engine.finish(turn, [*THOUGHTS, *ANSWER[:-1], 8000 + number]) is not None
    again = [
        engine.start(unnamed(10 + number), [*FIRST, *ANSWER[:-1], 8000 + number, *SECOND])
        for number in range(8)
    ]
    assert len({turn.session for turn in again}) == 8
    assert all(engine.finish(turn, ANSWER) is not None for turn in again)
    assert engine.store.num_idle == 16
    assert not any(residency.superseded for residency in engine.store.residencies())


def test_the_same_prompt_again_is_no_next_turn(engine: FakeEngine) -> None:
    first, _ = asked(engine, 1, FIRST)
    again = engine.finish(engine.start(unnamed(2), FIRST), [*THOUGHTS, 9, *ANSWER])
    assert again is not None
    assert (again.num_turns, again.wait) == (first.num_turns, WaitKind.ONE_SHOT)


def test_a_name_is_kept(engine: FakeEngine) -> None:
    asked(engine, 1, FIRST)
    turn = engine.start(key("session-alice"), [*FIRST, *ANSWER, *SECOND])
    assert (turn.session, turn.match.outcome) == (key("session-alice"), Outcome.FORKED)


def test_without_messages_only_a_whole_history_is_continued() -> None:
    engine = FakeEngine()
    asked(engine, 1, FIRST)
    assert engine.start(unnamed(2), [*FIRST, *ANSWER, *SECOND]).session == unnamed(2)
