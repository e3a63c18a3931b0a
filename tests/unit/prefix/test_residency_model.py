# SPDX-License-Identifier: Apache-2.0
"""Hypothesis: turns, forks, edits, preemptions, closes and resets in any order.

Each match is compared with a search over all residencies, each reference count with a recount of
who holds the block.
"""

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

from vllm_stateful.prefix import residency
from vllm_stateful.prefix.residency import ANONYMOUS, MAX_BRANCHES, is_anonymous
from vllm_stateful.types import Demotion, Outcome, SessionKey

BUDGET = 12
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=9)
NAMES = st.sampled_from(["session-one", "session-two", None])
SALTS = st.sampled_from([None, "tenant-a"])


def num_shared(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


class Residencies(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.engine = FakeEngine(BUDGET)
        self.store = self.engine.store
        self.histories: list[list[int]] = [[0]]

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
        self.compare(session, prompt)
        self.engine.start(session, prompt)

    def compare(self, session: SessionKey, prompt: list[int]) -> None:
        """The match of the store against a search over everything it holds."""
        match = self.store.match(session, array(prompt), len(prompt) - 1)
        same = [r for r in self.store.residencies() if r.session.identity == session.identity]
        wanted = prompt[:-1]
        longest = max((num_shared(r.tokens.tolist(), wanted) for r in same), default=0)
        own = [r for r in same if r.session == session]
        longest_own = max((num_shared(r.tokens.tolist(), wanted) for r in own), default=0)
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
        assert found.tokens[:num_tokens].tolist() == wanted[:num_tokens]
        whole = num_tokens in (found.frontier, len(wanted))
        assert num_tokens == longest or (whole and found.session == session)
        if match.session != session:
            assert whole
            assert is_anonymous(session)
            assert is_anonymous(found.session)
        expected = {True: Outcome.RESUMED, False: Outcome.DIVERGED}[whole]
        if match.session != found.session:
            expected = Outcome.FORKED
        assert match.outcome is expected

    def some_turn(self, data: st.DataObject) -> RunningTurn:
        return self.engine.running[data.draw(st.integers(0, len(self.engine.running) - 1))]

    @precondition(lambda self: self.engine.running)
    @rule(data=st.data(), output=st.lists(st.integers(0, 2), max_size=5))
    def finish(self, data: st.DataObject, output: list[int]) -> None:
        turn = self.some_turn(data)
        self.engine.finish(turn, output)
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
            self.store.give_back(lent)

    @rule()
    def demote_next(self) -> None:
        idle = [r for r in self.store.residencies() if r.is_idle]
        worst = min((r.worth for r in idle), default=None)
        pinned = self.store.pins.num_pinned
        num_freed = self.store.demote_next(Demotion.PRESSURE)
        assert num_freed == (None if worst is None else pinned - self.store.pins.num_pinned)
        gone = [r for r in idle if not r.alive]
        assert [r.worth for r in gone] == ([] if worst is None else [worst])

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

    @rule()
    def reset(self) -> None:
        self.store.reset()
        assert self.store.residencies() == []

    @invariant()
    def every_reference_is_explained(self) -> None:
        self.engine.check()

    @invariant()
    def branches_are_few_and_none_covers_another(self) -> None:
        for session in {r.session for r in self.store.residencies()}:
            idle = [b.tokens.tolist() for b in self.store.branches(session) if b.is_idle]
            assert len(idle) <= MAX_BRANCHES
            for a in idle:
                assert not any(b is not a and a == b[: len(a)] for b in idle)

    def teardown(self) -> None:
        self.store.reset()
        for turn in list(self.engine.running):
            self.engine.preempt(turn)
        assert self.engine.pool.ref_cnts == {}
        assert self.store.pins.num_pinned == self.store.num_sessions == self.store.num_idle == 0


def test_any_order_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "MIN_SHARED_TOKENS", 1)
    run_state_machine_as_test(
        Residencies, settings=settings(max_examples=150, stateful_step_count=30, deadline=None)
    )
