# SPDX-License-Identifier: Apache-2.0
"""Parts of a residency: ends given up, reasoning not kept, edits told from siblings."""

import pytest
from fake_pool import BLOCK_SIZE, FakeEngine, array, key

from vllm_stateful.prefix import demoting
from vllm_stateful.prefix.boundaries import MAX_MARKERS, BoundaryRules, Kind
from vllm_stateful.prefix.residency import PromptBase
from vllm_stateful.types import Demotion, Outcome

ALICE, BOB = key("session-alice"), key("session-bob")
MARKERS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
ROLES = ["system", "user", "assistant", "tool", "\n"]
VOCABULARY = {text: token for token, text in enumerate([*MARKERS, *ROLES])}
TEXTS = {token: text for text, token in VOCABULARY.items()}
RULES = BoundaryRules.of(VOCABULARY, lambda ids: "".join(TEXTS.get(i, " word") for i in ids))
NEW_LINE = VOCABULARY["\n"]
BEGIN, END, THINK, THOUGHT = (VOCABULARY[marker] for marker in MARKERS)


def message(role: str, *words: int) -> list[int]:
    return [BEGIN, VOCABULARY[role], NEW_LINE, *words, END]


def words(first: int, count: int) -> range:
    return range(first, first + count)


SYSTEM = message("system", *words(1000, 20))
QUESTION = message("user", *words(2000, 40))
ASK = [BEGIN, VOCABULARY["assistant"], NEW_LINE]
THOUGHTS = [THINK, *words(3000, 20), THOUGHT]
ANSWER = [*words(4000, 30), END]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    monkeypatch.setattr(demoting, "MIN_GIVEN_TOKENS", BLOCK_SIZE)
    return FakeEngine(rules=RULES)


# ---- ends ------------------------------------------------------------------------------------


def test_under_pressure_the_end_goes_up_to_where_a_message_begins(engine: FakeEngine) -> None:
    kept = engine.kept(ALICE, [*SYSTEM, *QUESTION, *ASK, *ANSWER])
    assert [engine.store.kind_at(kept, place) for place in (0, 30, 70)] == [
        Kind.SYSTEM,
        Kind.USER,
        Kind.ASSISTANT,
    ]
    engine.store.demote_next(Demotion.PRESSURE, num_wanted=2)
    answer_begins = len(SYSTEM) + len(QUESTION)
    assert kept.alive
    assert answer_begins <= kept.frontier < answer_begins + BLOCK_SIZE
    assert kept.frontier % BLOCK_SIZE == 0
    engine.store.demote_next(Demotion.PRESSURE, num_wanted=2)
    assert len(SYSTEM) <= kept.frontier < len(SYSTEM) + BLOCK_SIZE
    engine.store.demote_next(Demotion.PRESSURE, num_wanted=1)
    assert not kept.alive
    assert engine.store.demotions[Demotion.PRESSURE] == 3
    engine.check()


def test_more_than_the_last_message_goes_when_more_is_wanted(engine: FakeEngine) -> None:
    kept = engine.kept(ALICE, [*SYSTEM, *QUESTION, *ASK, *ANSWER])
    wanted = -(-len(ANSWER) // BLOCK_SIZE) + 3
    freed = engine.store.demote_next(Demotion.PRESSURE, num_wanted=wanted)
    assert freed is not None
    assert freed >= wanted
    assert kept.frontier < len(SYSTEM) + BLOCK_SIZE


def test_what_two_sessions_share_is_not_cut(engine: FakeEngine) -> None:
    alice = engine.kept(ALICE, [*SYSTEM, *QUESTION])
    bob = engine.kept(BOB, [*SYSTEM, *message("user", *words(9000, 40))])
    engine.store.demote_next(Demotion.PRESSURE, num_wanted=1)
    assert not alice.alive, "no message of its own begins behind what both share"
    assert bob.frontier > len(SYSTEM)
    assert bob.blocks[0].ref_cnt == 1
    engine.check()


def test_what_is_left_is_resumed(engine: FakeEngine) -> None:
    prompt = [*SYSTEM, *QUESTION, *ASK, *ANSWER]
    kept = engine.kept(ALICE, prompt)
    engine.store.demote_next(Demotion.PRESSURE, num_wanted=2)
    turn = engine.start(ALICE, [*prompt, 1, 2, 3], PromptBase(tuple(prompt), len(prompt)))
    assert turn.match.outcome is Outcome.RESUMED
    assert turn.match.num_tokens == kept.frontier < len(prompt)
    engine.finish(turn)
    engine.check()


def test_without_rules_all_of_a_residency_goes() -> None:
    engine = FakeEngine()
    kept = engine.kept(ALICE, [*SYSTEM, *QUESTION, *ASK, *ANSWER])
    engine.store.demote_next(Demotion.PRESSURE, num_wanted=1)
    assert not kept.alive


def test_a_prompt_of_nothing_but_markers_is_not_cut(engine: FakeEngine) -> None:
    """Whoever sends one pays for it with one node, not with a node for each."""
    assert RULES is not None
    assert len(RULES.cuts(array([BEGIN, VOCABULARY["user"], NEW_LINE] * 100)).starts) == 100
    hostile = array([BEGIN] * (MAX_MARKERS + 1))
    assert len(RULES.cuts(hostile).starts) == 0


# ---- reasoning -------------------------------------------------------------------------------


def converse(engine: FakeEngine, session_id: str, *, keeps: bool, num_turns: int) -> None:
    history = [*SYSTEM]
    for number in range(num_turns):
        prompt = [*history, *message("user", *words(5000 + 100 * number, 20)), *ASK]
        engine.turn(session_id, prompt, [*THOUGHTS, *ANSWER])
        history = [*prompt, *(THOUGHTS if keeps else []), *ANSWER]


def test_reasoning_that_never_comes_back_is_not_kept(engine: FakeEngine) -> None:
    converse(engine, "session-alice", keeps=False, num_turns=8)
    assert engine.store.num_reasoning_dropped > 0
    alice = engine.store.branches(ALICE)[-1]
    assert alice.tokens[-3:].tolist() == ASK
    assert THINK not in alice.tokens
    assert alice.num_turns == 8
    engine.check()


def test_reasoning_that_comes_back_is_kept(engine: FakeEngine) -> None:
    converse(engine, "session-alice", keeps=True, num_turns=8)
    assert engine.store.num_reasoning_dropped == 0


def test_a_client_that_begins_to_send_reasoning_is_noticed(engine: FakeEngine) -> None:
    converse(engine, "session-alice", keeps=False, num_turns=6)
    dropped = engine.store.num_reasoning_dropped
    converse(engine, "session-bob", keeps=True, num_turns=6)
    (bob,) = engine.store.branches(BOB)
    assert THINK in bob.tokens
    assert engine.store.num_reasoning_dropped > dropped
    engine.check()


def test_a_retried_prompt_says_nothing_about_reasoning(engine: FakeEngine) -> None:
    """Its template opens the reasoning; a retry ends there, and has dropped nothing."""
    prompt = [*SYSTEM, *QUESTION, *ASK, THINK, NEW_LINE]
    for retry in range(6):
        answer = [*words(6000 + 100 * retry, 30), THOUGHT, *ANSWER]
        engine.turn(ALICE, prompt, answer)
    assert engine.store.num_reasoning_dropped == 0


def test_reasoning_is_known_though_a_sibling_answer_begins_like_it(engine: FakeEngine) -> None:
    prompt = [*SYSTEM, *QUESTION, *ASK, THINK, NEW_LINE]
    first = engine.turn(ALICE, prompt, [*words(6000, 30), THOUGHT, *ANSWER])
    second = engine.turn(ALICE, prompt, [*words(7000, 30), THOUGHT, *ANSWER])
    assert first is not None
    assert second is not None
    assert first.reasoning is not None
    assert second.reasoning is not None
    assert second.reasoning.start == first.reasoning.start == len(prompt) - 2
    assert second.reasoning.head.tolist() == [THINK, NEW_LINE, *words(7000, 6)]


def test_tenants_do_not_learn_of_each_other(engine: FakeEngine) -> None:
    converse(engine, "session-alice", keeps=False, num_turns=6)
    dropped = engine.store.num_reasoning_dropped
    engine.turn(key("session-carol", "other"), [*SYSTEM, *QUESTION, *ASK], [*THOUGHTS, *ANSWER])
    assert engine.store.num_reasoning_dropped == dropped


# ---- edits -----------------------------------------------------------------------------------


def volatile(line: int) -> list[int]:
    return message("system", *words(6000, 20), line, *words(6100, 10))


def test_a_volatile_system_line_supersedes_the_old_branch(engine: FakeEngine) -> None:
    """Most of it differs from there on, but the question is the same one."""
    old = engine.kept(ALICE, [*volatile(1), *QUESTION, *ASK, *ANSWER])
    more = message("user", *words(7000, 10))
    turn = engine.start(ALICE, [*volatile(2), *QUESTION, *ASK, *ANSWER, *more, *ASK])
    assert turn.match.outcome is Outcome.DIVERGED
    assert engine.store.kind_at(old, turn.match.num_tokens) is Kind.SYSTEM
    engine.finish(turn, ANSWER)
    assert old.superseded
    assert engine.store.demote_next(Demotion.PRESSURE) is not None
    assert not old.alive, "all of it goes, and first"


def test_a_sub_agent_under_the_same_id_is_a_sibling(engine: FakeEngine) -> None:
    old = engine.kept(ALICE, [*SYSTEM, *QUESTION, *ASK, *ANSWER])
    engine.kept(ALICE, [*SYSTEM, *message("user", *words(8000, 40)), *ASK, *ANSWER])
    assert not old.superseded
    assert len(engine.store.branches(ALICE)) == 2


def test_dropped_tool_results_supersede_the_old_branch(engine: FakeEngine) -> None:
    result = message("tool", *words(100, 90))
    last = message("tool", *words(200, 40))
    old = engine.kept(ALICE, [*SYSTEM, *result, *ASK, *ANSWER, *last, *ASK])
    empty = message("tool", 7)
    engine.kept(ALICE, [*SYSTEM, *empty, *ASK, *ANSWER, *last, *ASK, *ANSWER, *ASK])
    assert old.superseded


# ---- wishes ----------------------------------------------------------------------------------


def test_a_wish_outlives_others_and_the_idle_time(engine: FakeEngine) -> None:
    turn = engine.start(ALICE, [*SYSTEM, *QUESTION])
    alice = engine.finish(turn, wish_s=3600.0)
    bob = engine.kept(BOB, [*SYSTEM, *message("user", *words(9000, 40))])
    assert alice is not None
    engine.now = 1000.0
    engine.store.expire(idle_s=900.0)
    assert alice.alive
    assert not bob.alive
    engine.now = 5000.0
    engine.store.expire(idle_s=900.0)
    assert not alice.alive
    engine.check()
