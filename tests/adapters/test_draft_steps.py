# SPDX-License-Identifier: Apache-2.0
"""Drafts from sessions in the scheduler's steps: who gets them, and what they save."""

from typing import Any

import pytest
from recorded_engine import ALICE, BOB, HISTORY, Engine

from vllm_stateful.adapters.speculation import XARG

NUM_TOKENS = 16


def new_engine() -> Engine:
    return Engine(num_blocks=64, session_drafts=True, num_drafts=8)


def answered(cache_salt: str | None = None) -> Engine:
    """An engine whose agent has said something before, in another session."""
    engine = new_engine()
    engine.turn("first", HISTORY, BOB, max_tokens=NUM_TOKENS, cache_salt=cache_salt)
    return engine


def num_drafted(engine: Engine, **options: Any) -> int:
    before = engine.scheduler.speculation.drafts.num_drafted
    engine.turn("second", HISTORY, ALICE, max_tokens=NUM_TOKENS, **options)
    return int(engine.scheduler.speculation.drafts.num_drafted - before)


def test_what_an_agent_has_said_before_is_drafted_and_saves_steps() -> None:
    engine = answered()
    assert num_drafted(engine) >= NUM_TOKENS // 2
    assert len(engine.outputs) <= NUM_TOKENS // 2
    assert engine.scheduler._draft_stats()["num_drafts_accepted"] >= NUM_TOKENS // 2


@pytest.mark.parametrize("value", [0, "0", False, "off", "no drafts, please", [1]])
def test_a_request_can_do_without(value: object) -> None:
    """What cannot be read counts as a no: the request is served as stock vLLM serves it."""
    assert num_drafted(answered(), extra_args={XARG: value}) == 0


@pytest.mark.parametrize(("value", "is_drafted"), [(1, True), ("on", True), (None, False)])
def test_a_request_can_ask_for_them_where_rows_are_dear(value: object, is_drafted: bool) -> None:
    engine = answered()
    engine.scheduler.speculation.costs.least_chance = lambda *_: 1.0
    drafted = num_drafted(engine, extra_args={} if value is None else {XARG: value})
    assert (drafted > NUM_TOKENS // 2) == is_drafted


def test_nothing_is_drafted_across_tenants() -> None:
    from_itself = num_drafted(new_engine(), cache_salt="another")
    assert num_drafted(answered("one"), cache_salt="one") > from_itself
    assert num_drafted(answered("one"), cache_salt="another") == from_itself


@pytest.mark.parametrize("greedy_only", [True, False])
@pytest.mark.parametrize("num_steps", range(6))
def test_on_a_cpu_nothing_is_verified_beside_a_turn_that_is_not_greedy(
    num_steps: int, greedy_only: bool
) -> None:
    """vLLM's rejection sampler has no temperatures there; the turn may come after the drafts."""
    engine = answered()
    assert engine.scheduler.speculation.greedy_only  # on this machine
    engine.scheduler.speculation.greedy_only = greedy_only
    engine.add("greedy", HISTORY, session_id=ALICE, max_tokens=NUM_TOKENS)
    for _ in range(num_steps):
        engine.step()
    engine.outputs.clear()
    engine.add("drawn", HISTORY, session_id="session-carol", max_tokens=4, temperature=0.5)
    engine.run()
    together = [o for o in engine.outputs if "drawn" in o.num_scheduled_tokens]
    assert together
    if greedy_only:
        assert not any(output.scheduled_spec_decode_tokens for output in together)
    engine.turn("third", HISTORY, BOB, max_tokens=NUM_TOKENS)
    assert any(output.scheduled_spec_decode_tokens for output in engine.outputs)
