# SPDX-License-Identifier: Apache-2.0
"""Sessions beside vLLM's offload tier, step by step: what is loaded, kept, and not taken in."""

from collections.abc import Iterator
from typing import Any

import pytest
from recorded_engine import ALICE, BOB, HISTORY, Engine
from simulated_engine import expected_answer
from simulated_tier import offloading
from vllm.v1.request import RequestStatus

from vllm_stateful.adapters.offload_policy import StatefulCachePolicy


@pytest.fixture
def tiered(options: dict[str, Any]) -> Iterator[Engine]:
    engine = Engine(**options, kv_transfer=offloading(200))
    yield engine
    engine.run()
    engine.check_nothing_is_lost()


def num_loaded(engine: Engine) -> int:
    assert engine.worker.tier is not None
    return engine.worker.tier.num_loaded


def flood(engine: Engine, name: str = "flood") -> None:
    """A turn that needs the whole pool, and is not kept."""
    engine.turn(name, [n * 7 % 100 for n in range(156)], session_id=None, max_tokens=1)
    engine.manager.store.drop_all()
    forget_free_blocks(engine)


def forget_free_blocks(engine: Engine) -> None:
    """As if other turns had reused every block that nobody holds."""
    pool = engine.manager.block_pool
    pool.evict_blocks({b.block_id for b in pool.blocks if not b.ref_cnt and b.block_hash})


def test_a_resident_session_is_resumed_and_nothing_is_loaded(tiered: Engine) -> None:
    history = tiered.turn("first", HISTORY)
    history = tiered.turn("second", [*history, 1])
    assert tiered.num_scheduled("second") == 2
    tiered.turn("third", [*history, 2])
    assert tiered.num_scheduled("third") == 2
    assert tiered.outcomes() == {"cold": 1, "resumed": 2}
    assert num_loaded(tiered) == 0


def test_a_session_that_the_gpu_lost_is_restored_before_its_turn(tiered: Engine) -> None:
    history = tiered.turn("first", HISTORY)
    flood(tiered)
    assert not tiered.branches(ALICE)
    history = tiered.turn("second", [*history, 1])
    assert num_loaded(tiered) == 5
    assert tiered.num_scheduled("second") == len(history) - 1 - 20
    assert tiered.outcomes() == {"cold": 2, "restored": 1}
    tiered.turn("third", [*history, 2])
    assert tiered.num_scheduled("third") == 2
    assert tiered.outcomes()["resumed"] == 1


def test_what_is_left_of_a_session_is_used_and_only_the_rest_is_loaded(tiered: Engine) -> None:
    history = tiered.turn("first", list(range(50)))
    (kept,) = tiered.branches(ALICE)
    tiered.store._cut_back(kept, 24, next(iter(tiered.store.demotions)))
    forget_free_blocks(tiered)
    tiered.turn("second", [*history, 1])
    assert num_loaded(tiered) == 6
    assert tiered.num_scheduled("second") == 52 - 48
    assert tiered.outcomes() == {"cold": 1, "restored": 1}


def test_a_longer_chain_on_the_host_beats_a_partly_filled_block(tiered: Engine) -> None:
    """vLLM drops our last, partial block then, so that no copy races with the load."""
    history = tiered.turn("first", list(range(50)))
    tiered.turn("sibling", [*history[:30], 99], BOB)
    tiered.store.close(tiered.branches(ALICE)[0].session)
    forget_free_blocks(tiered)
    tiered.turn("second", [*history, 1])
    assert num_loaded(tiered) == 12 - 7
    assert tiered.outcomes()["restored"] == 1


def test_a_turn_that_is_aborted_while_its_kv_is_loaded_keeps_nothing(tiered: Engine) -> None:
    history = tiered.turn("first", HISTORY)
    flood(tiered)
    request = tiered.add("second", [*history, 1], session_id=ALICE)
    while request.status != RequestStatus.WAITING_FOR_REMOTE_KVS:
        tiered.step()
    tiered.abort("second")
    tiered.run()
    assert not tiered.branches(ALICE)
    tiered.turn("third", [*history, 1])


def test_a_turn_is_kept_only_after_the_step_that_may_still_write_its_blocks() -> None:
    engine = Engine(num_blocks=41, async_scheduling=True, kv_transfer=offloading(200))
    engine.add("first", HISTORY, session_id=ALICE, max_tokens=1)
    seen = []
    while engine.scheduler.has_requests() or engine.in_flight:
        engine.step()
        seen.append((len(engine.scheduler.ending), len(engine.branches(ALICE))))
        assert 0 in seen[-1]
    assert seen[-1] == (0, 1)
    engine.add("second", [*HISTORY, 1], session_id=ALICE, max_tokens=40)
    for _ in range(6):
        engine.step()
    engine.abort("second")  # a step is in flight
    assert len(engine.scheduler.ending) == 1
    engine.run()
    (kept,) = engine.branches(ALICE)
    assert kept.frontier > len(HISTORY)
    engine.check_nothing_is_lost()


def test_the_tier_gives_up_the_session_that_is_expected_back_last(
    options: dict[str, Any],
) -> None:
    engine = Engine(**options, kv_transfer=offloading(12))
    tools = engine.manager
    tools.called_tool = lambda request: "bash" if request.session_id == ALICE else None
    alice = engine.turn("first", HISTORY)
    bob = engine.turn("other", [50, *HISTORY], BOB)
    engine.turn("third", [60, *HISTORY], "session-carol")
    flood(engine, "flood-1")
    engine.turn("again", [*alice, 1])
    assert num_loaded(engine) == 5
    flood(engine, "flood-2")
    engine.turn("bob-again", [*bob, 1], BOB)
    assert num_loaded(engine) < 5 + 5
    engine.check_nothing_is_lost()


def test_when_all_cannot_fit_a_one_shot_is_not_offloaded(options: dict[str, Any]) -> None:
    engine = Engine(**options, kv_transfer=offloading(12))
    engine.manager.called_tool = lambda request: "bash"
    for n in range(4):
        engine.turn(f"turn-{n}", [n, *HISTORY], f"session-{n}")
    tier = engine.scheduler.tier
    assert tier is not None
    assert tier.working_set.ratio > 1
    assert engine.scheduler.stateful("stats", {})["offload_working_set"] > 1
    request = engine.add("one-shot", [70, *HISTORY])
    engine.run()
    assert tier.num_declined == 1
    assert request.kv_transfer_params == {"max_offload_tokens": 0}
    engine.turn("fifth", [5, *HISTORY], "session-5")
    assert tier.num_declined == 1
    engine.check_nothing_is_lost()


def test_a_tier_with_files_behind_it_declines_nobody(options: dict[str, Any]) -> None:
    transfer = offloading(12)
    transfer.kv_connector_extra_config["secondary_tiers"] = [{"type": "fs"}]
    engine = Engine(**options, kv_transfer=transfer)
    engine.manager.called_tool = lambda request: "bash"
    for n in range(4):
        engine.turn(f"turn-{n}", [n, *HISTORY], f"session-{n}")
    request = engine.add("one-shot", [70, *HISTORY])
    engine.run()
    tier = engine.scheduler.tier
    assert tier is not None
    assert tier.working_set.ratio > 1
    assert tier.num_declined == 0
    assert not request.kv_transfer_params
    engine.check_nothing_is_lost()


def test_a_limit_that_the_client_gave_stands(options: dict[str, Any]) -> None:
    engine = Engine(**options, kv_transfer=offloading(4))
    engine.manager.called_tool = lambda request: "bash"
    for n in range(4):
        engine.turn(f"turn-{n}", [n, *HISTORY], f"session-{n}")
    given = {"kv_transfer_params": {"max_offload_tokens": 8}}
    request = engine.add("one-shot", [70, *HISTORY], extra_args=given)
    engine.run()
    assert request.kv_transfer_params == {"max_offload_tokens": 8}


def test_with_another_eviction_policy_sessions_are_kept_all_the_same(
    options: dict[str, Any],
) -> None:
    engine = Engine(**options, kv_transfer=offloading(200, "lru"))
    assert engine.scheduler.tier is None
    assert engine.scheduler.stateful_off is None
    history = engine.turn("first", HISTORY)
    flood(engine)
    engine.turn("second", [*history, 1])
    assert engine.outcomes()["restored"] == 1
    assert engine.scheduler.stateful("stats", {})["num_offloads_declined"] == 0
    engine.check_nothing_is_lost()


def test_a_reset_of_both_caches_forgets_all_but_the_answers_are_right(tiered: Engine) -> None:
    history = tiered.turn("first", HISTORY)
    tiered.step()
    assert tiered.scheduler.reset_prefix_cache(reset_connector=True)
    assert not tiered.branches(ALICE)
    tiered.add("second", [*history, 1], session_id=ALICE, max_tokens=3)
    tiered.run()
    assert tiered.answer("second") == expected_answer([*history, 1], 3)
    assert num_loaded(tiered) == 0


def test_a_policy_belongs_to_the_scheduler_that_was_built_with_it() -> None:
    StatefulCachePolicy.take_newest()
    policy = StatefulCachePolicy(3)
    assert StatefulCachePolicy.take_newest() is policy
    assert StatefulCachePolicy.take_newest() is None


GROUPED = [
    ("window", "full"),
    ("chunk", "full"),
    ("state", "full"),
    ("state", "state", "window", "full"),
    ("head", "full"),
    ("state", "head", "full"),
    ("window*2", "full"),
    ("state*2", "full*2"),
]
"""KV cache groups of a model, as the simulated engine names them."""


@pytest.fixture(params=GROUPED, ids="-".join)
def grouped(request: pytest.FixtureRequest, options: dict[str, Any]) -> Iterator[Engine]:
    asynchronous = options["async_scheduling"]
    kinds = request.param
    engine = Engine(
        num_blocks=200, kinds=kinds, async_scheduling=asynchronous, kv_transfer=offloading(400)
    )
    yield engine
    engine.run()
    engine.check_nothing_is_lost()


def test_a_resident_session_of_several_groups_is_resumed(grouped: Engine) -> None:
    history = grouped.turn("first", list(range(50)), max_tokens=4)
    for number in range(3):
        history = grouped.turn(f"turn-{number}", [*history, number], max_tokens=4)
        assert grouped.num_scheduled(f"turn-{number}") == 1 + 1 + 3
    assert num_loaded(grouped) == 0


def test_a_session_of_several_groups_that_the_gpu_lost_is_restored(grouped: Engine) -> None:
    """What is missing then are the last blocks, of which vLLM stores the fewer the more kinds."""
    history = grouped.turn("first", list(range(50)), max_tokens=4)
    grouped.manager.store.drop_all()
    forget_free_blocks(grouped)
    history = grouped.turn("second", [*history, 1], max_tokens=4)
    assert num_loaded(grouped) > 0
    assert grouped.num_scheduled("second") <= 5 + 3 * max(grouped.worker.sizes)
    assert grouped.outcomes()["restored"] == 1
    grouped.turn("third", [*history, 2], max_tokens=4)
    assert grouped.num_scheduled("third") == 1 + 1 + 3


def test_what_is_left_of_several_groups_is_used_and_the_rest_is_loaded(grouped: Engine) -> None:
    """Another session has kept the begin."""
    history = grouped.turn("first", list(range(50)), max_tokens=4)
    grouped.turn("sibling", [*history[:30], 99], BOB)
    for kept in grouped.branches(ALICE):
        grouped.store.close(kept.session)
    forget_free_blocks(grouped)
    history = grouped.turn("second", [*history, 1], max_tokens=4)
    assert num_loaded(grouped) > 0
    assert grouped.num_scheduled("second") <= 5 + 3 * max(grouped.worker.sizes)
    grouped.turn("third", [*history, 2], max_tokens=4)
    assert grouped.num_scheduled("third") == 1 + 1 + 3


def test_the_tier_counts_the_tokens_that_it_holds_of_all_groups() -> None:
    for kinds, tokens in ((("full",), 4), (("window", "full"), 4), (("full*2", "full"), 2)):
        engine = Engine(num_blocks=100, kinds=kinds, kv_transfer=offloading(60))
        assert engine.scheduler.tier.working_set._capacity == 60 * tokens
