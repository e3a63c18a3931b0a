# SPDX-License-Identifier: Apache-2.0
"""Hypothesis: turns, forks, edits, preemptions, closes and resets in any order.

Each match is compared with a search over the tokens of all turns that ended (a naive model: token
tuples, by residency), each slot of the pool with the tokens that were written there, and each
reference count with a recount of who holds the block. ``STATEFUL_PROGRAMS=5000`` plays as many.
"""

import os
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from fake_pool import BLOCK_SIZE, FakeEngine, RunningTurn, array, key
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from vllm_stateful.prefix import demoting, matching, reasoning
from vllm_stateful.prefix.boundaries import ANSWERS, BoundaryRules
from vllm_stateful.prefix.edits import QUESTIONS
from vllm_stateful.prefix.residency import ANONYMOUS, PromptBase, Residency, is_anonymous
from vllm_stateful.prefix.residency_store import MAX_BRANCHES
from vllm_stateful.types import Demotion, Outcome, SessionKey

BUDGET = 24
MARKERS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
VOCABULARY = {text: token for token, text in enumerate(["user", "assistant", "\n", *MARKERS])}
TEXTS = {token: text for text, token in VOCABULARY.items()}
RULES = BoundaryRules.of(VOCABULARY, lambda ids: "".join(TEXTS[token] for token in ids))
TOKEN = st.sampled_from(sorted(TEXTS))
TOKENS = st.lists(TOKEN, min_size=1, max_size=9)
NUM_PROGRAMS = int(os.environ.get("STATEFUL_PROGRAMS", "150"))
NAMES = st.sampled_from(["session-one", "session-two", None])
SALTS = st.sampled_from([None, "tenant-a"])


def num_shared(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


class Residencies(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.engine = FakeEngine(BUDGET, rules=RULES)
        self.store = self.engine.store
        self.histories: list[list[int]] = [[0]]
        self.prompts: list[list[int]] = [[0]]
        self.tokens_of: dict[Residency, list[int]] = {}
        self.num_asked: dict[Residency, int] = {}
        """The naive model."""

    def session(self, name: str | None, salt: str | None) -> SessionKey:
        return key(name or f"{ANONYMOUS}{self.engine.num_turns}", salt)

    @rule(data=st.data(), name=NAMES, salt=SALTS, new=TOKENS)
    def start(
        self, data: st.DataObject, name: str | None, salt: str | None, new: list[int]
    ) -> None:
        """Continue, edit or truncate any history under any session."""
        history = data.draw(st.sampled_from(self.histories))
        kept = data.draw(st.sampled_from([len(history), data.draw(st.integers(0, len(history)))]))
        prompt = [*history[:kept][-40:], *new]
        session = self.session(name, salt)
        earlier = data.draw(st.sampled_from(self.prompts))
        num_shared_tokens = num_shared(earlier, prompt)
        base = PromptBase(tuple(earlier), num_shared_tokens) if num_shared_tokens else None
        self.compare(session, prompt, base)
        self.engine.start(session, prompt, base)

    @rule(
        data=st.data(),
        name=NAMES,
        salt=SALTS,
        turns=st.lists(st.tuples(TOKENS, TOKENS, TOKENS), min_size=1, max_size=4),
    )
    def converse(
        self,
        data: st.DataObject,
        name: str | None,
        salt: str | None,
        turns: list[tuple[list[int], list[int], list[int]]],
    ) -> None:
        """Questions and answers, each with some reasoning that the next prompt may not have."""
        begin, end, think, thought = (VOCABULARY[marker] for marker in MARKERS)
        user, assistant, line = range(3)
        history = data.draw(st.sampled_from(self.histories))[-20:]
        keeps_reasoning = data.draw(st.booleans())
        for question, thoughts, answer in turns:
            prompt = [*history, begin, user, line, *question, end, begin, assistant, line]
            earlier = self.prompts[-1]
            base = PromptBase(tuple(earlier), num_shared(earlier, prompt))
            session = self.session(name, salt)
            self.compare(session, prompt, base)
            turn = self.engine.start(session, prompt, base)
            goes_on = [begin, user, line, *question, end] if data.draw(st.booleans()) else []
            self.end(turn, [think, *thoughts, thought, *answer, end, *goes_on])
            kept = [think, *thoughts, thought] if keeps_reasoning else []
            history = [*prompt, *kept, *answer, end]

    def compare(self, session: SessionKey, prompt: list[int], base: PromptBase | None) -> None:
        """The match of the store against a search over everything it holds."""
        self.shorten()
        match = self.store.match(session, array(prompt), len(prompt) - 1, base)
        assert match == self.store.match(session, array(prompt), len(prompt) - 1)
        same = [r for r in self.store.residencies() if r.session.identity == session.identity]
        wanted = prompt[:-1]
        longest = max((num_shared(self.tokens_of[r], wanted) for r in same), default=0)
        own = [r for r in same if r.session == session]
        longest_own = max((num_shared(self.tokens_of[r], wanted) for r in own), default=0)
        if longest_own > longest - BLOCK_SIZE:  # one's own branch, though up to a block shorter
            assert longest - BLOCK_SIZE < match.num_tokens <= longest
        else:
            assert match.num_tokens == longest
        if match.residency is None:
            assert match.outcome is Outcome.COLD
            assert match.session == session
            return
        found = match.residency
        assert found.alive
        assert found.session.identity == session.identity
        num_tokens = match.num_tokens
        assert self.tokens_of[found][:num_tokens] == wanted[:num_tokens]
        whole = num_tokens in (found.frontier, len(wanted))
        assert num_tokens == longest or (whole and found.session == session)
        are_unnamed = is_anonymous(session) and is_anonymous(found.session)
        others = [r for r in same if num_shared(self.tokens_of[r], wanted) == longest]
        is_alone = all(r.session == found.session or not is_anonymous(r.session) for r in others)
        is_edit = (
            found.is_idle
            and is_alone
            and self.store.waits.wait_of(found.session) is not None
            and self.is_continued(found, num_tokens, prompt)
        )
        assert (match.session != session) == (
            are_unnamed and session != found.session and (whole or is_edit)
        )
        expected = {True: Outcome.RESUMED, False: Outcome.DIVERGED}[whole]
        if match.session != found.session:
            expected = Outcome.FORKED
        assert match.outcome is expected

    def is_continued(self, residency: Residency, num_tokens: int, prompt: list[int]) -> bool:
        """Whether the tokens reach behind the last question, or to an answer in its place."""
        assert RULES is not None
        tokens = self.tokens_of[residency]
        cuts = RULES.cuts(array(tokens))
        starts = cuts.starts.tolist()
        pairs = enumerate(zip(starts, cuts.kinds, strict=True))
        num_asked = self.num_asked[residency]
        asked = [n for n, (at, kind) in pairs if kind in QUESTIONS and at < num_asked]
        if not asked:
            return False
        start, end = [*starts, len(tokens)][asked[-1] : asked[-1] + 2]
        if num_tokens < start:
            return False
        start = end if num_tokens >= end else start
        now = RULES.cuts(array(prompt))
        segments = list(zip(now.starts.tolist(), now.kinds, strict=True))
        behind = [kind for begin, kind in segments if begin > start]
        return dict(segments).get(start) in ANSWERS and any(kind in QUESTIONS for kind in behind)

    def some_turn(self, data: st.DataObject) -> RunningTurn:
        return self.engine.running[data.draw(st.integers(0, len(self.engine.running) - 1))]

    @precondition(lambda self: self.engine.running)
    @rule(data=st.data(), output=st.lists(TOKEN, max_size=5))
    def finish(self, data: st.DataObject, output: list[int]) -> None:
        self.end(self.some_turn(data), output)

    def end(self, turn: RunningTurn, output: list[int]) -> None:
        made = self.engine.finish(turn, output)
        if made is not None:
            self.tokens_of[made] = [*turn.prompt, *output][: made.frontier]
            self.num_asked[made] = len(turn.prompt)
        self.prompts.append(turn.prompt)
        self.histories.append([*turn.prompt, *output])
        self.store.enforce_budget()
        assert self.store.pins.num_pinned <= BUDGET

    @precondition(lambda self: self.engine.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.engine.preempt(self.some_turn(data))

    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        """An allocation that borrows and is refused."""
        idle = [r for r in self.store.residencies() if r.is_idle]
        if idle:
            lent = data.draw(st.sampled_from(idle))
            self.store.borrow(lent, "refused")
            self.store.undo_borrow(lent)

    @rule()
    def demote_next(self) -> None:
        idle = [r for r in self.store.residencies() if r.is_idle]
        worst = min((r.worth for r in idle), default=None)
        pinned = self.store.pins.num_pinned
        num_freed = self.store.demote_next(Demotion.PRESSURE)
        assert num_freed == (None if worst is None else pinned - self.store.pins.num_pinned)
        gone = [r for r in idle if not r.alive or r.frontier < len(self.tokens_of[r])]
        assert [r.worth for r in gone] == ([] if worst is None else [worst])
        assert all(r.frontier % BLOCK_SIZE == 0 for r in gone if r.alive)

    @rule(name=NAMES, salt=SALTS)
    def close(self, name: str | None, salt: str | None) -> None:
        session = self.session(name, salt)
        num_idle = sum(branch.is_idle for branch in self.store.branches(session))
        assert self.store.close(session) == num_idle
        assert not any(branch.is_idle for branch in self.store.branches(session))

    @rule(seconds=st.integers(1, 60))
    def expire(self, seconds: int) -> None:
        self.engine.now += seconds
        self.store.expire(idle_s=60.0)

    @rule(yes=st.integers(0, 4).map(lambda number: number == 4))
    def reset(self, yes: bool) -> None:
        if not yes:
            return
        self.store.drop_all()
        assert self.store.residencies() == []

    @invariant()
    def every_reference_is_explained(self) -> None:
        self.shorten()
        self.engine.check()

    def shorten(self) -> None:
        """Residencies may have given up their ends, but nothing else."""
        for residency in self.store.residencies():
            del self.tokens_of[residency][residency.frontier :]
            assert residency.tokens.tolist() == self.tokens_of[residency]

    @invariant()
    def branches_are_few_and_none_covers_another(self) -> None:
        for session in {r.session for r in self.store.residencies()}:
            idle = [b.tokens.tolist() for b in self.store.branches(session) if b.is_idle]
            assert len(idle) <= MAX_BRANCHES
            for a in idle:
                assert not any(b is not a and a == b[: len(a)] for b in idle)

    def teardown(self) -> None:
        self.store.drop_all()
        for turn in list(self.engine.running):
            self.engine.preempt(turn)
        assert self.engine.pool.ref_cnts == {}
        assert self.store.pins.num_pinned == self.store.num_sessions == self.store.num_idle == 0


def test_any_order_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "MIN_SHARED_TOKENS", 1)
    monkeypatch.setattr(demoting, "MIN_GIVEN_TOKENS", 1)
    monkeypatch.setattr(reasoning, "MIN_TOKENS", 2)
    monkeypatch.setattr(reasoning, "MIN_SEEN", 0)
    run_state_machine_as_test(
        Residencies,
        settings=settings(max_examples=NUM_PROGRAMS, stateful_step_count=30, deadline=None),
    )
