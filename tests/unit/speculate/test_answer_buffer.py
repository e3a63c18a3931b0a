# SPDX-License-Identifier: Apache-2.0
"""The regions of a device's buffer: what a running turn may read is its own agent's, and recent."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vllm_stateful.speculate.answer_buffer import END, LEAD_TOKENS, AnswerBuffer, Span, Write

REGION, REGIONS, AGENTS = 24, 3, 5


def answer(agent: int, number: int, num_tokens: int) -> np.ndarray:
    """Tokens that say whose they are."""
    return np.arange(num_tokens, dtype=np.int32) + 1000 * agent + 10_000 * number


class Turns(RuleBasedStateMachine):
    @initialize(extra=st.integers(0, REGION - 1))
    def start(self, extra: int) -> None:
        num_tokens = REGIONS * REGION + extra
        self.buffer = AnswerBuffer(num_tokens, REGION)
        self.device = np.full(num_tokens, END, np.int32)
        self.running: list[tuple[int, Span]] = []
        self.latest: dict[int, np.ndarray] = {}
        self.number = 0

    @rule(agent=st.integers(0, AGENTS - 1))
    def begin(self, agent: int) -> None:
        span = self.buffer.begins(agent)
        held = {other for other, _ in self.running}
        if span is None:
            assert agent not in held
            assert len(held) == REGIONS
        else:
            self.running.append((agent, span))

    @rule(data=st.data(), num_tokens=st.integers(0, 2 * REGION))
    def end(self, data: st.DataObject, num_tokens: int) -> None:
        if not self.running:
            return
        place = data.draw(st.integers(0, len(self.running) - 1))
        agent, _ = self.running.pop(place)
        self.number += 1
        prompt = answer(agent, self.number, LEAD_TOKENS + 3)
        said = answer(agent, self.number, num_tokens)
        write = self.buffer.ends(agent, prompt, said)
        assert (write is None) == (num_tokens == 0)
        if write is not None:
            self.wrote(agent, write)
            expected = np.append(np.append(prompt[-LEAD_TOKENS:], said)[-(REGION - 1) :], END)
            assert write.tokens.tolist() == expected.tolist()
            self.latest[agent] = write.tokens

    def wrote(self, agent: int, write: Write) -> None:
        self.device[write.start : write.start + len(write.tokens)] = write.tokens
        for other, span in self.running:
            if other != agent:
                assert not (span.start <= write.start < span.start + REGION)

    @invariant()
    def everyone_reads_their_own(self) -> None:
        for agent, old in getattr(self, "running", []):
            now = self.buffer.span(agent)
            assert now.start == old.start
            assert now.num_tokens >= old.num_tokens
            read = self.device[now.start : now.start + now.num_tokens]
            assert set((read[read != END] % 10_000 // 1000).tolist()) <= {agent}


TestTurns = Turns.TestCase


def test_the_newest_answer_is_there() -> None:
    buffer, device = AnswerBuffer(REGION, REGION), np.full(REGION, END, np.int32)
    for number in range(1, 20):
        buffer.begins("agent")
        said = np.full(3, number, np.int32)
        write = buffer.ends("agent", np.empty(0, np.int32), said)
        assert write is not None
        device[write.start : write.start + len(write.tokens)] = write.tokens
        span = buffer.span("agent")
        read = device[span.start : span.start + span.num_tokens].tolist()
        newest = set(range(max(1, number - 4), number + 1))
        assert newest <= set(read)


def test_an_agent_that_waits_makes_room_for_another() -> None:
    buffer = AnswerBuffer(2 * REGION, REGION)
    for agent in ("first", "second"):
        buffer.begins(agent)
        buffer.ends(agent, answer(0, 0, 1), answer(0, 0, 5))
    buffer.begins("second")
    assert buffer.begins("third") == Span(0, 0) or buffer.span("third").num_tokens == 0
    assert buffer.begins("first") is None
    assert buffer.span("second").num_tokens > 0


@given(num_tokens=st.integers(0, REGION - 1))
def test_a_buffer_without_a_region_is_refused(num_tokens: int) -> None:
    with pytest.raises(ValueError, match="hold no region"):
        AnswerBuffer(num_tokens, REGION)
