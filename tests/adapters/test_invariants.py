# SPDX-License-Identifier: Apache-2.0
"""Each way in which the books of the block pool can be wrong is noticed, and named."""

from collections.abc import Iterator

import pytest
from recorded_engine import ALICE, BOB, HISTORY, Engine

from vllm_stateful.adapters.engine.hash_check import HashCheck
from vllm_stateful.adapters.engine.invariants import check_pool
from vllm_stateful.errors import InvariantError


@pytest.fixture
def idle_and_running() -> Iterator[Engine]:
    """Alice is idle, Bob runs on a fork of what she has, and the books are right."""
    engine = Engine(num_blocks=41)
    history = engine.turn("first", HISTORY)
    engine.add("second", [*history, 1, 2, 3], session_id=BOB, max_tokens=4)
    engine.step()
    counts = check_pool(engine.scheduler)
    assert counts["total"] == 40
    assert min(counts.values()) > 0
    yield engine
    check_pool(engine.scheduler)  # each test puts right what it broke
    engine.run()
    engine.check_nothing_is_lost()


def wrong(engine: Engine) -> str:
    with pytest.raises(InvariantError) as raised:
        check_pool(engine.scheduler)
    return str(raised.value)


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_reference_count(idle_and_running: Engine, difference: int) -> None:
    block = idle_and_running.branches(ALICE)[0].blocks[0]
    before = block.ref_cnt
    block.ref_cnt += difference
    said = f"block {block.block_id}: ref_cnt {block.ref_cnt}, but requests hold it 1 times"
    assert wrong(idle_and_running).startswith(said)
    block.ref_cnt = before


def test_a_reference_to_a_free_block(idle_and_running: Engine) -> None:
    block = next(b for b in idle_and_running.manager.block_pool.blocks[1:] if b.ref_cnt == 0)
    block.ref_cnt = 1
    assert wrong(idle_and_running).startswith(f"block {block.block_id}: ref_cnt 1")
    block.ref_cnt = 0


def test_the_null_block_has_no_books(idle_and_running: Engine) -> None:
    null = idle_and_running.manager.block_pool.null_block
    null.ref_cnt += 5
    check_pool(idle_and_running.scheduler)
    null.ref_cnt -= 5


@pytest.mark.parametrize("ledger", ["holders", "users"])
def test_the_pin_ledger(idle_and_running: Engine, ledger: str) -> None:
    block_id = idle_and_running.branches(ALICE)[0].blocks[-1].block_id
    counts = getattr(idle_and_running.store.pins, f"_{ledger}")
    counts[block_id] += 5
    assert wrong(idle_and_running) == f"block {block_id}: the pin ledger miscounts its {ledger}"
    counts[block_id] -= 5


def test_the_number_of_pinned_blocks(idle_and_running: Engine) -> None:
    pins = idle_and_running.store.pins
    right = pins.num_pinned
    pins.num_pinned += 1
    assert wrong(idle_and_running) == f"the pin ledger counts {right + 1} blocks, not {right}"
    pins.num_pinned -= 1


def test_a_block_that_is_lost(idle_and_running: Engine) -> None:
    queue = idle_and_running.manager.block_pool.free_block_queue
    lost = queue.popleft()
    assert "!= total 40" in wrong(idle_and_running)
    queue.append(lost)


# ---- block hashes --------------------------------------------------------------------------------


def hash_check(engine: Engine) -> HashCheck:
    return HashCheck(engine.scheduler.hash_block_size, "sha256")


def hashes_are_wrong(engine: Engine) -> str:
    with pytest.raises(InvariantError) as raised:
        hash_check(engine).check(engine.manager, engine.scheduler.requests)
    return str(raised.value)


def test_hashes_are_those_of_tokens_and_identity(idle_and_running: Engine) -> None:
    engine = idle_and_running
    check = hash_check(engine)
    check.check(engine.manager, engine.scheduler.requests)
    engine.add("third", [*HISTORY, 7, 7], session_id=ALICE, max_tokens=9, cache_salt="salt")
    while engine.scheduler.requests:
        engine.step()
        check.check(engine.manager, engine.scheduler.requests)


def test_a_hash_that_was_inherited_from_another_identity(idle_and_running: Engine) -> None:
    request = idle_and_running.scheduler.requests["second"]
    request.cache_salt = "another"
    assert hashes_are_wrong(idle_and_running).startswith("request second: the hash of its block 0")
    request.cache_salt = None


def test_a_block_that_bears_the_hash_of_something_else(idle_and_running: Engine) -> None:
    group = idle_and_running.manager.coordinator.single_type_managers[0]
    first, second, *_ = group.req_to_blocks["second"]
    first._block_hash, second._block_hash = second._block_hash, first._block_hash
    assert "bears the hash of something else" in hashes_are_wrong(idle_and_running)
    first._block_hash, second._block_hash = second._block_hash, first._block_hash
