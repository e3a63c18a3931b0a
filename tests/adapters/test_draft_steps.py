# SPDX-License-Identifier: Apache-2.0
"""Drafts from sessions in the scheduler's steps: who gets them, and what they save."""

from types import SimpleNamespace
from typing import Any

import pytest
from recorded_engine import ALICE, BOB, HISTORY, Engine

from vllm_stateful.adapters.engine.agents import XARG
from vllm_stateful.adapters.speculation import has_head, why_not_beside_head
from vllm_stateful.config import StatefulConfig
from vllm_stateful.speculate.step_costs import LEAST_CHANCE

NUM_TOKENS = 16


def new_engine() -> Engine:
    """Rows are cheap, however busy the machine of the test is."""
    engine = Engine(num_blocks=64, session_drafts=True, num_drafts=8)
    engine.scheduler.engine_drafts.costs.least_chance = lambda *_: LEAST_CHANCE
    return engine


def answered(cache_salt: str | None = None) -> Engine:
    """An engine whose agent has said something before, in another session."""
    engine = new_engine()
    engine.turn("first", HISTORY, BOB, max_tokens=NUM_TOKENS, cache_salt=cache_salt)
    return engine


def num_drafted(engine: Engine, **options: Any) -> int:
    before = engine.scheduler.engine_drafts.drafts.num_drafted
    engine.turn("second", HISTORY, ALICE, max_tokens=NUM_TOKENS, **options)
    return int(engine.scheduler.engine_drafts.drafts.num_drafted - before)


def test_what_an_agent_has_said_before_is_drafted_and_saves_steps() -> None:
    engine = answered()
    assert num_drafted(engine) >= NUM_TOKENS // 2
    assert len(engine.outputs) <= NUM_TOKENS // 2
    assert engine.scheduler.stateful("stats", {})["num_drafts_accepted"] >= NUM_TOKENS // 2


def test_a_turn_tells_how_many_of_its_drafts_were_right() -> None:
    engine = answered()
    num_drafted(engine)
    asked = {"request_id": "second", "cache_salt": None}
    ((turn,),) = engine.scheduler.stateful("turn", asked).values()
    verified = [output.scheduled_spec_decode_tokens.get("second", ()) for output in engine.outputs]
    assert turn["drafted_tokens"] == sum(map(len, verified))
    num_steps = sum("second" in output.num_scheduled_tokens for output in engine.outputs)
    assert turn["accepted_draft_tokens"] == NUM_TOKENS - num_steps
    assert turn["drafted_tokens"] >= turn["accepted_draft_tokens"] > 0


@pytest.mark.parametrize("value", [0, "0", False, "off", "no drafts, please", [1]])
def test_a_request_can_do_without(value: object) -> None:
    """What cannot be read counts as a no: the request is served as stock vLLM serves it."""
    assert num_drafted(answered(), extra_args={XARG: value}) == 0


@pytest.mark.parametrize(("value", "is_drafted"), [(1, True), ("on", True), (None, False)])
def test_a_request_can_ask_for_them_where_rows_are_dear(value: object, is_drafted: bool) -> None:
    engine = answered()
    engine.scheduler.engine_drafts.costs.least_chance = lambda *_: 1.0
    drafted = num_drafted(engine, extra_args={} if value is None else {XARG: value})
    assert (drafted > NUM_TOKENS // 2) == is_drafted


@pytest.mark.parametrize("asked", [{"logit_bias": {1: 1.0}}, {"temperature": 0.5, "min_p": 0.1}])
def test_what_drafts_would_not_pass_is_not_drafted(asked: dict[str, Any]) -> None:
    engine = answered()
    engine.scheduler.engine_drafts.greedy_only = False
    assert num_drafted(engine, **asked, extra_args={XARG: 1}) == 0


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
    assert engine.scheduler.engine_drafts.greedy_only  # on this machine
    engine.scheduler.engine_drafts.greedy_only = greedy_only
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


@pytest.mark.parametrize("num_steps", range(6))
def test_nothing_is_verified_beside_a_turn_that_scores_tokens(num_steps: int) -> None:
    """vLLM's rejection sampler ends the engine at `logprob_token_ids`, on every platform."""
    engine = answered()
    engine.scheduler.engine_drafts.greedy_only = False
    engine.add("greedy", HISTORY, session_id=ALICE, max_tokens=NUM_TOKENS)
    for _ in range(num_steps):
        engine.step()
    engine.outputs.clear()
    scored = {"logprob_token_ids": [1, 2], "extra_args": {XARG: 1}}
    engine.add("scored", HISTORY, session_id="session-carol", max_tokens=4, **scored)
    engine.run()
    together = [o for o in engine.outputs if "scored" in o.num_scheduled_tokens]
    assert together
    assert not any(output.scheduled_spec_decode_tokens for output in together)
    engine.turn("third", HISTORY, BOB, max_tokens=NUM_TOKENS)
    assert any(output.scheduled_spec_decode_tokens for output in engine.outputs)


def beside_head(**options: Any) -> Engine:
    """Looks are cheap."""
    engine = Engine(num_blocks=64, session_drafts=True, beside_head=True, num_drafts=4, **options)
    engine.scheduler.engine_drafts.drafts.beside.pays = lambda *_: True
    return engine


def test_beside_a_head_what_was_said_before_saves_steps() -> None:
    """The head of the simulated worker has 2 of 4 tokens right, on average."""
    alone = Engine(num_blocks=64, num_drafts=4)
    both = beside_head()
    for engine in (alone, both):
        for session in ("first", "second"):
            engine.outputs.clear()
            engine.turn(session, HISTORY, ALICE, max_tokens=40)
    assert len(both.outputs) < len(alone.outputs)
    assert both.scheduler.stateful("stats", {})["num_drafts_accepted"] > 0


@pytest.mark.parametrize("is_long", [True, False])
def test_beside_a_head_a_request_can_do_without_drafts(is_long: bool) -> None:
    """None of the head's either, whether looks pay or rest."""
    engine = beside_head()
    if not is_long:
        engine.scheduler.engine_drafts._rests = 1000
    engine.turn("first", HISTORY, ALICE, max_tokens=8, extra_args={XARG: 0})
    drafted = [step.scheduled_spec_decode_tokens for step in engine.outputs]
    assert not any(drafted)


def test_looks_that_do_not_pay_rest_and_the_head_goes_on() -> None:
    engine = beside_head()
    speculation = engine.scheduler.engine_drafts
    speculation.drafts.beside.pays = lambda *_: False
    engine.turn("first", HISTORY, ALICE, max_tokens=60)
    assert any(step.scheduled_spec_decode_tokens for step in engine.outputs)
    before = speculation.drafts.beside._gain
    engine.turn("second", HISTORY, ALICE, max_tokens=60)
    assert speculation.drafts.beside._gain > before, "it goes on to learn while it rests"


def test_a_turn_that_ends_while_looks_rest_is_remembered() -> None:
    engine = beside_head()
    engine.scheduler.engine_drafts._rests = 1000
    engine.turn("first", HISTORY, ALICE, max_tokens=6)
    assert len(engine.scheduler.engine_drafts.drafts.waiting()) == 1


@pytest.mark.parametrize(("options", "is_chosen"), [({}, True), ({"temperature": 0.5}, False)])
def test_with_a_seed_only_the_heads_draft_is_verified(
    options: dict[str, Any], is_chosen: bool
) -> None:
    engine = beside_head()
    for session in ("first", "second", "third"):
        engine.turn(session, HISTORY, ALICE, max_tokens=40, seed=7, **options)
    assert (engine.scheduler.engine_drafts.drafts.num_drafted > 0) == is_chosen


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"draft_sample_method": "probabilistic"}, "draft_sample_method probabilistic"),
        ({"rejection_sample_method": "synthetic"}, "rejection_sample_method synthetic"),
        ({"rejection_sample_method": "fly"}, "rejection_sample_method fly"),
        ({"rejection_sample_method": "block"}, None),
        ({"async_scheduling": True}, "async scheduling with model runner V1"),
        (
            {"use_v2_model_runner": True},
            "not measured on a device yet, --stateful-drafts on takes them",
        ),
        ({"async_scheduling": True, "use_v2_model_runner": True, "drafts": "on"}, None),
        ({"drafts": "off"}, "--stateful-drafts off"),
        ({"watermark_config": object()}, "drafts are watermarked"),
        (
            {"use_v2_model_runner": True, "drafts": "on", "disable": frozenset({"device-drafts"})},
            "--stateful-disable device-drafts",
        ),
    ],
)
def test_a_head_is_left_alone_for_a_reason(changed: dict[str, Any], reason: str | None) -> None:
    head = {"draft_sample_method": "greedy", "rejection_sample_method": "standard"}
    vllm_config = SimpleNamespace(
        speculative_config=SimpleNamespace(method="mtp", **{**head, **changed}),
        use_v2_model_runner=changed.get("use_v2_model_runner", False),
        scheduler_config=SimpleNamespace(async_scheduling=changed.get("async_scheduling", False)),
        watermark_config=changed.get("watermark_config"),
    )
    options = {name: changed[name] for name in ("drafts", "disable") if name in changed}
    assert has_head(vllm_config)
    assert why_not_beside_head(vllm_config, StatefulConfig(**options)) == reason
