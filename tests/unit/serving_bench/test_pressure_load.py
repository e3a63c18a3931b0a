# SPDX-License-Identifier: Apache-2.0
"""The load of the pressure benchmark: deterministic, with recorded gaps, and how much it holds."""

from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks.serving.pressure_capacity import Live, cache_blocks, live
from benchmarks.serving.pressure_load import (
    FIRST,
    RUNNING,
    TOOL_TURN,
    USER_TURN,
    Load,
    LoadOptions,
    Session,
    make_load,
)
from benchmarks.serving.recorded import Conversation, Step, rendered

OPTIONS = LoadOptions(
    max_sessions=99,
    session_rate=2.0,
    one_shot_rate=4.0,
    minutes=5.0,
    tool_cap_s=60.0,
    user_cap_s=200.0,
    max_request_tokens=5000,
    one_shot_tokens=(20, 60),
)
GAPS = {"tool": [5.0, 1000.0], "user": [100.0, 5000.0]}
TEXTS = [f"Text {number}. " * 40 for number in range(50)]


def count(text: str) -> int:
    return len(text) // 4 + 1 if text else 0


def conversation(number: int, num_steps: int = 8) -> Conversation:
    steps = tuple(
        Step(
            ({"role": "user", "content": f"question {number} {place} " * 5},),
            f"answer {number} {place}",
            calls_tool=place % 2 == 0,
        )
        for place in range(num_steps)
    )
    return Conversation(f"c{number}", {"role": "system", "content": "System. " * 20}, steps)


RECORDED = [conversation(number) for number in range(60)]


def load(seed: int = 1, options: LoadOptions = OPTIONS) -> Load:
    return make_load(seed, options, RECORDED, GAPS, TEXTS, count)


def test_same_seed_same_load() -> None:
    assert load(1) == load(1)
    assert load(1) != load(2)


def test_gaps_are_recorded_ones_up_to_the_caps() -> None:
    turns = [turn for session in load().sessions for turn in session.turns]
    by_kind = {kind: {t.gap_s for t in turns if t.kind == kind} for kind in (TOOL_TURN, USER_TURN)}
    assert by_kind == {TOOL_TURN: {5.0, 60.0}, USER_TURN: {100.0, 200.0}}


def test_the_run_opens_on_sessions_in_progress() -> None:
    made = load()
    kinds = {session.turns[0].kind for session in made.sessions}
    assert kinds == {FIRST, RUNNING}
    for session in made.sessions:
        assert {turn.kind for turn in session.turns[1:]} <= {TOOL_TURN, USER_TURN}
        begins_s = [begin_s for begin_s, _ in session.held]
        is_running = session.turns[0].kind == RUNNING
        assert is_running == (begins_s[0] < 0)
        assert session.turns[0].gap_s in begins_s
        assert 0 <= session.turns[0].gap_s < made.run_s


def messages_of(session: Session) -> list[str]:
    texts = [session.system["content"]]
    for turn in session.turns:
        texts += [message["content"] for message in turn.new_messages] + [turn.answer]
    return texts


def test_no_part_of_a_conversation_is_left_out() -> None:
    by_name = {each.name: each for each in RECORDED}
    for session in load().sessions:
        steps = by_name[session.conversation].steps
        told = [text for step in steps for text in (step.new_messages[0]["content"], step.answer)]
        texts = messages_of(session)[1:]
        assert texts == told[: len(texts)]


def test_prompts_are_as_long_as_they_are_counted() -> None:
    session = load().sessions[0]
    turn = session.turns[0]
    assert turn.num_prompt_tokens == count(rendered([session.system, *turn.new_messages]))
    sizes = [(t.num_prompt_tokens + t.num_answer_tokens, t) for t in session.turns]
    for (known, _), (_, later) in pairwise(sizes):
        assert later.num_new_tokens == later.num_prompt_tokens - known


def test_each_conversation_is_used_once() -> None:
    names = [session.conversation for session in load().sessions]
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match="recorded conversations"):
        make_load(1, OPTIONS, RECORDED[:5], GAPS, TEXTS, count)


def test_system_messages_are_shared_only_when_wanted() -> None:
    assert len(load().shared_tokens) == len(load().sessions)
    shared = load(options=replace(OPTIONS, has_own_line=False))
    assert len(shared.shared_tokens) == 1


def test_sessions_end_before_they_grow_too_long() -> None:
    short = load(options=replace(OPTIONS, max_request_tokens=300))
    assert max(s.held[-1][1] for s in short.sessions) <= 300
    assert max(s.held[-1][1] for s in load().sessions) > 300


def test_one_shots_are_unlike_each_other_and_of_the_wanted_length() -> None:
    shots = load().one_shots
    assert len({shot.text for shot in shots}) == len(shots) > 5
    assert all(20 <= count(shot.text) <= 60 for shot in shots)
    with pytest.raises(ValueError, match="one-shots"):
        make_load(1, OPTIONS, RECORDED, GAPS, TEXTS[:2], count)


def session(name: str, system: str, held: tuple[tuple[float, int], ...], ends_s: float) -> Session:
    return Session(name, name, {"role": "system", "content": system}, (), held, ends_s)


def test_live_tokens_are_averages_over_the_run() -> None:
    sessions = (
        session("a", "S", ((-50.0, 100), (25.0, 300)), 75.0),
        session("b", "S", ((50.0, 200),), 1000.0),
        session("c", "T", ((90.0, 500),), 100.0),
    )
    made = Load(100.0, sessions, (), {"S": 40, "T": 10})
    now = live(made)
    assert now.num_sessions == pytest.approx((75 + 50 + 10) / 100)
    unshared = 100 * 25 + 300 * 50 + 200 * 50 + 500 * 10
    assert now.num_unshared_tokens == pytest.approx(unshared / 100)
    shared_twice = 40 * 25  # from 50 to 75 s both sessions hold the same 40 tokens
    assert now.num_tokens == pytest.approx((unshared - shared_twice) / 100)


def test_the_cache_holds_a_share_of_what_is_live() -> None:
    lives = [Live(1, 1000.0, 9999.0), Live(1, 3000.0, 9999.0)]
    assert cache_blocks(0.4, lives, 32) == 25
