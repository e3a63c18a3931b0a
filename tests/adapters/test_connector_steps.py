# SPDX-License-Identifier: Apache-2.0
"""Sessions beside KV connectors, step by step: LMCache's, and several at once.

The simulated worker refuses a load into a block that anybody else holds.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from recorded_engine import ALICE, BOB, HISTORY, Engine
from simulated_connectors import several
from simulated_engine import expected_answer
from simulated_lmcache import CHUNK, lmcache, stand_in
from simulated_tier import offloading
from test_offload_steps import flood, forget_free_blocks
from vllm.v1.request import RequestStatus

from vllm_stateful.adapters.engine.connectors import unsupported_connector
from vllm_stateful.prefix.groups import FullGroup

stand_in()

LONG = list(range(50))


@pytest.fixture(params=[True, False], ids=["overwrites", "skips"])
def cached(options: dict[str, Any], request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = Engine(**options, kv_transfer=lmcache(100, overwrites=request.param))
    yield engine
    engine.run()
    engine.check_nothing_is_lost()


def num_loaded(engine: Engine) -> int:
    return int(engine.worker.tier.num_loaded)


def cut_back(engine: Engine, num_tokens: int) -> None:
    """Of a session's KV so much is left."""
    (kept,) = engine.branches(ALICE)
    engine.store._cut_back(kept, num_tokens, next(iter(engine.store.demotions)))
    forget_free_blocks(engine)


def test_beside_lmcache_a_resident_session_is_resumed_and_nothing_is_loaded(
    cached: Engine,
) -> None:
    history = cached.turn("first", LONG)
    for number in range(5):
        history = cached.turn(f"turn-{number}", [*history, number])
        assert cached.num_scheduled(f"turn-{number}") == 2
    assert cached.outcomes() == {"cold": 1, "resumed": 5}
    assert num_loaded(cached) == 0


def test_a_session_that_is_lost_comes_back_from_lmcache(cached: Engine) -> None:
    history = cached.turn("first", LONG)
    flood(cached)
    history = cached.turn("second", [*history, 1])
    assert cached.num_scheduled("second") == 52 - 4 * CHUNK
    assert num_loaded(cached) == 4 * CHUNK
    cached.turn("third", [*history, 2])
    assert cached.num_scheduled("third") == 2
    assert cached.outcomes()["restored"] == 1


@pytest.mark.parametrize("left", [CHUNK, CHUNK + 4, 2 * CHUNK - 4, 2 * CHUNK + 8])
def test_what_is_kept_of_a_chunk_is_never_loaded_over(cached: Engine, left: int) -> None:
    """The load begins where its chunk does, in blocks of its own."""
    history = cached.turn("first", LONG)
    cut_back(cached, left)
    before = {b.block_id: b for r in cached.branches(ALICE) for b in r.blocks}
    kept = {name: list(cached.worker.slots[name]) for name in before}
    cached.add("second", [*history, 1], session_id=ALICE, max_tokens=1)
    while not num_loaded(cached):
        cached.step()
    assert {name: cached.worker.slots[name] for name in before} == kept
    cached.run()
    assert cached.answer("second") == expected_answer([*history, 1], 1)
    assert num_loaded(cached) == 4 * CHUNK - left // CHUNK * CHUNK


def test_ours_wins_where_theirs_does_not_reach_further(cached: Engine) -> None:
    """49 of 50 tokens are kept; four chunks, which are 48, are not loaded."""
    history = cached.turn("first", LONG)
    cut_back(cached, 49)
    cached.turn("second", [*history, 1])
    assert num_loaded(cached) == 0
    assert cached.num_scheduled("second") == 52 - 49


def test_a_fork_and_its_parent_are_both_right_after_a_load(cached: Engine) -> None:
    history = cached.turn("first", LONG)
    cut_back(cached, 28)
    cached.add("parent", [*history, 1], session_id=ALICE, max_tokens=3)
    cached.add("child", [*history, 2], session_id=BOB, max_tokens=3)
    cached.run()
    assert cached.answer("parent") == expected_answer([*history, 1], 3)
    assert cached.answer("child") == expected_answer([*history, 2], 3)


def test_a_lookup_that_takes_a_step_is_waited_for(options: dict[str, Any]) -> None:
    engine = Engine(**options, kv_transfer=lmcache(100, is_slow=True))
    history = engine.turn("first", LONG)
    cut_back(engine, 20)
    engine.turn("second", [*history, 1])
    assert num_loaded(engine) == 4 * CHUNK - CHUNK
    engine.check_nothing_is_lost()


def test_an_answer_between_two_questions_is_not_believed(options: dict[str, Any]) -> None:
    """Their lookup ends between our question and vLLM's: that load would begin inside a chunk."""
    engine = Engine(**options, kv_transfer=lmcache(100))
    history = engine.turn("first", LONG)
    cut_back(engine, 20)
    theirs = engine.scheduler.connector._lmcache_engine
    ask, answers = theirs.get_num_new_matched_tokens, iter([None])
    theirs.get_num_new_matched_tokens = lambda *args: next(answers, ask(*args))
    engine.turn("second", [*history, 1])
    assert num_loaded(engine) == 4 * CHUNK - CHUNK
    engine.check_nothing_is_lost()


def test_a_load_that_fails_costs_time_and_nothing_else() -> None:
    engine = Engine(num_blocks=41, kv_transfer=lmcache(100, fails=True))
    history = engine.turn("first", LONG)
    for number in range(20):
        cut_back(engine, 16)
        engine.turn(f"turn-{number}", [*history, number])
    assert engine.worker.tier.num_failed > 1
    engine.check_nothing_is_lost()


def test_a_load_that_fails_and_ends_its_request_does_not_cost_the_session() -> None:
    """With ``kv_load_failure_policy`` fail, vLLM's default."""
    engine = Engine(num_blocks=41, kv_transfer=lmcache(100, "fail", fails=True))
    history = engine.turn("first", LONG)
    for number in range(20):
        cut_back(engine, 2 * CHUNK)
        request = engine.add(f"turn-{number}", [*history, number], session_id=ALICE, max_tokens=1)
        engine.run()
        if request.status == RequestStatus.FINISHED_ERROR:
            break
    assert request.status == RequestStatus.FINISHED_ERROR
    (kept,) = engine.branches(ALICE)
    assert kept.frontier == 2 * CHUNK
    engine.turn("again", [*history, 1, 2, 3])
    engine.check_nothing_is_lost()


def test_a_turn_that_is_aborted_while_its_load_is_in_flight_keeps_nothing_of_it() -> None:
    engine = Engine(num_blocks=41, async_scheduling=True, kv_transfer=lmcache(100))
    history = engine.turn("first", LONG)
    flood(engine)
    engine.add("second", [*history, 1], session_id=ALICE, max_tokens=9)
    engine.step()
    assert num_loaded(engine)
    engine.abort("second")
    engine.run()
    assert not engine.branches(ALICE)
    engine.check_nothing_is_lost()


def test_a_turn_that_is_aborted_after_its_load_is_kept() -> None:
    engine = Engine(num_blocks=41, async_scheduling=True, kv_transfer=lmcache(100))
    history = engine.turn("first", LONG)
    flood(engine)
    engine.add("second", [*history, 1], session_id=ALICE, max_tokens=40)
    for _ in range(5):
        engine.step()
    engine.abort("second")
    engine.run()
    (kept,) = engine.branches(ALICE)
    assert kept.frontier >= len(history) + 1
    engine.check_nothing_is_lost()


@pytest.mark.parametrize(
    "config",
    [
        lambda: several(offloading(200), lmcache(100)),
        lambda: several(lmcache(100), offloading(200)),
        lambda: several(offloading(200), offloading(100, "lru")),
        lambda: several(offloading(100, "lru"), offloading(200)),
        lambda: several(several(offloading(200)), lmcache(100)),
    ],
    ids=["offload+lmcache", "lmcache+offload", "ours+lru", "lru+ours", "nested"],
)
def test_several_connectors_at_once(options: dict[str, Any], config: Any) -> None:
    engine = Engine(**options, kv_transfer=config())
    assert engine.scheduler.stateful_off is None
    history = engine.turn("first", LONG)
    history = engine.turn("second", [*history, 1])
    assert engine.num_scheduled("second") == 2
    assert num_loaded(engine) == 0
    flood(engine)
    history = engine.turn("third", [*history, 2])
    assert engine.outcomes()["restored"] == 1
    assert num_loaded(engine) > 0
    engine.turn("fourth", [*history, 3])
    assert engine.num_scheduled("fourth") == 2
    engine.check_nothing_is_lost()


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_the_tier_with_our_policy_is_found_among_several(order: list[int]) -> None:
    both = [offloading(200), offloading(100, "lru")]
    ratios = []
    for config in (several(*(both[place] for place in order)), both[0]):
        engine = Engine(num_blocks=41, kv_transfer=config)
        assert engine.scheduler.tier is not None
        engine.turn("first", HISTORY)
        ratios.append(engine.scheduler.tier.working_set.ratio)
    assert ratios[0] == ratios[1] > 0


def connector(name: str, module: str = "nixl.connector", role: str = "kv_both", **more: Any) -> Any:
    made = type(name, (), more)()
    type(made).__module__ = f"vllm.distributed.kv_transfer.kv_connector.v1.{module}"
    made._kv_transfer_config = SimpleNamespace(kv_role=role)
    return made


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (connector("NixlConnector", role="kv_producer"), "NixlConnector as kv_producer: P/D"),
        (connector("NixlConnector", role="kv_consumer"), "NixlConnector as kv_consumer: P/D"),
        (connector("NixlPushConnector"), "NixlPushConnector as kv_both: P/D transfer"),
        (connector("MooncakeConnector", "mooncake.mooncake_connector"), "as kv_both: P/D transfer"),
        (connector("ExampleConnector", "example_connector"), "ExampleConnector as kv_both: a KV"),
        (
            connector("LMCacheConnectorV1", "lmcache_connector", "kv_producer"),
            "LMCacheConnectorV1 as kv_producer: P/D transfer was not tried",
        ),
        (
            connector(
                "LMCacheConnectorV1",
                "lmcache_connector",
                _lmcache_engine=SimpleNamespace(config=SimpleNamespace(enable_blending=True)),
            ),
            "LMCacheConnectorV1 as kv_both: blended KV",
        ),
        (
            connector("LMCacheMPConnectorUpstream", "lmcache_mp_connector"),
            "LMCacheMPConnectorUpstream as kv_both: LMCache as a server was not run",
        ),
        (
            connector(
                "MultiConnector",
                "multi_connector",
                sub_connectors=[
                    connector("OffloadingConnector", "offloading_connector"),
                    connector("NixlConnector", role="kv_producer"),
                ],
            ),
            "NixlConnector as kv_producer: P/D transfer",
        ),
        (
            connector("MultiConnector", "multi_connector", "kv_consumer", sub_connectors=[]),
            "MultiConnector as kv_consumer: P/D transfer was not tried",
        ),
    ],
)
def test_what_is_not_supported_is_named_with_its_role(found: Any, reason: str) -> None:
    scheduler = SimpleNamespace(connector=found, use_eagle=False, num_prefill_lookahead=0)
    assert reason in str(unsupported_connector(scheduler, [FullGroup(4)]))


@pytest.mark.parametrize(
    "found",
    [
        connector("LMCacheConnectorV1", "lmcache_connector"),
        connector("OffloadingConnector", "offloading_connector"),
        connector("OffloadingConnector", "offloading_connector", "kv_producer"),
        connector(
            "MultiConnector",
            "multi_connector",
            sub_connectors=[
                connector("OffloadingConnector", "offloading_connector"),
                connector("LMCacheConnectorV1", "lmcache_connector"),
            ],
        ),
    ],
)
def test_what_is_supported(found: Any) -> None:
    scheduler = SimpleNamespace(connector=found, use_eagle=False, num_prefill_lookahead=0)
    assert unsupported_connector(scheduler, [FullGroup(4)]) is None
