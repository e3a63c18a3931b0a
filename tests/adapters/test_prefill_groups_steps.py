# SPDX-License-Identifier: Apache-2.0
"""A burst of turns that share a prefix which is computed in chunks, step by step."""

from typing import Any

import pytest
from recorded_engine import Engine
from simulated_engine import expected_answer

from vllm_stateful.adapters.engine import prefill_groups

PREFIX = list(range(60))
CHUNK, NUM_AGENTS = 8, 6


def prompt_of(agent: int) -> list[int]:
    return [*PREFIX, 70 + agent, 80 + agent, 90 + agent]


@pytest.fixture
def burst(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Long prompts leave room for others: a chunk is an eighth of a step."""
    monkeypatch.setattr(prefill_groups, "MIN_SAVED", 8)
    engine = Engine(**{**options, "num_blocks": 101})
    config = engine.scheduler.scheduler_config
    monkeypatch.setattr(config, "long_prefill_token_threshold", CHUNK)
    return engine


def finish(engine: Engine, agents: list[int]) -> None:
    engine.run()
    for agent in agents:
        assert engine.answer(f"agent-{agent}") == expected_answer(prompt_of(agent), 4)
    assert len(engine.scheduler.prefills.groups) <= 1, "the last prefill is noted as over later"
    assert not engine.scheduler.prefills.groups._waiting
    engine.check_nothing_is_lost()


def num_prefilled(engine: Engine, agents: list[int]) -> int:
    return sum(engine.num_scheduled(f"agent-{agent}") - 3 for agent in agents)


def test_the_shared_prefix_is_computed_once(burst: Engine) -> None:
    agents = list(range(NUM_AGENTS))
    for agent in agents:
        burst.add(f"agent-{agent}", prompt_of(agent))
    finish(burst, agents)
    assert num_prefilled(burst, agents) == len(PREFIX) + 3 * NUM_AGENTS
    assert burst.scheduler.prefills.groups.num_joined == NUM_AGENTS - 1


def test_stock_would_compute_it_again_and_again(
    burst: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(burst.scheduler, "prefills", None)
    agents = list(range(NUM_AGENTS))
    for agent in agents:
        burst.add(f"agent-{agent}", prompt_of(agent))
    burst.run()
    assert num_prefilled(burst, agents) > 2 * len(PREFIX)


def first_step_of(engine: Engine, name: str, at_least: int) -> int:
    """The step after which so many tokens of a prompt were scheduled."""
    total = 0
    for number, output in enumerate(engine.outputs):
        new = [n for n in output.scheduled_new_reqs if n.req_id == name]
        total += sum(n.num_computed_tokens for n in new)
        total += output.num_scheduled_tokens.get(name, 0)
        if total >= at_least:
            return number
    raise AssertionError(f"{name} never got so far")


def test_nobody_is_later_than_the_one_it_waited_for(burst: Engine) -> None:
    """On its own each would have taken as many chunks: it is late by one step at most."""
    agents = list(range(NUM_AGENTS))
    for agent in agents:
        burst.add(f"agent-{agent}", prompt_of(agent))
    finish(burst, agents)
    done = [first_step_of(burst, f"agent-{agent}", len(PREFIX) + 3) for agent in agents]
    assert max(done) - done[0] <= 1


def test_another_that_shares_nothing_is_not_held_back(burst: Engine) -> None:
    for agent in (0, 1):
        burst.add(f"agent-{agent}", prompt_of(agent))
    other = list(range(200, 230))
    burst.add("other", other)
    burst.step()
    assert burst.outputs[0].num_scheduled_tokens.keys() == {"agent-0", "other"}
    finish(burst, [0, 1])
    assert burst.answer("other") == expected_answer(other, 4)


@pytest.mark.parametrize("event", ["abort", "preempt"])
def test_when_the_first_goes_away_another_takes_over(burst: Engine, event: str) -> None:
    for agent in range(4):
        burst.add(f"agent-{agent}", prompt_of(agent))
    for _ in range(3):
        burst.step()
    if event == "abort":
        burst.abort("agent-0")
    else:
        scheduler = burst.scheduler
        leader = next(r for r in scheduler.running if r.request_id == "agent-0")
        scheduler.running.remove(leader)
        scheduler._preempt_request(leader, 0.0)
    finish(burst, [1, 2, 3] if event == "abort" else [0, 1, 2, 3])
    assert num_prefilled(burst, [1, 2, 3]) <= len(PREFIX) + 9


def test_one_that_waits_may_go_away(burst: Engine) -> None:
    for agent in range(3):
        burst.add(f"agent-{agent}", prompt_of(agent))
    for _ in range(2):
        burst.step()
    burst.abort("agent-1")
    finish(burst, [0, 2])
    assert burst.scheduler.prefills.groups.num_joined == 1


def test_tenants_do_not_wait_for_each_other(burst: Engine) -> None:
    burst.add("agent-0", prompt_of(0), cache_salt="a")
    burst.add("agent-1", prompt_of(1), cache_salt="b")
    burst.step()
    assert burst.outputs[0].num_scheduled_tokens == {"agent-0": CHUNK, "agent-1": CHUNK}
    finish(burst, [0, 1])


def test_sub_agents_of_a_resident_parent_do_not_wait(burst: Engine) -> None:
    burst.turn("parent", PREFIX)
    for agent in range(4):
        burst.add(f"agent-{agent}", prompt_of(agent))
    burst.step()
    assert len(burst.outputs[-1].num_scheduled_tokens) == 4
    finish(burst, list(range(4)))
