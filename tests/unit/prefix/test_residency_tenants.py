# SPDX-License-Identifier: Apache-2.0
"""The residency store of several API keys, whose clients choose salts of their own."""

from fake_pool import BLOCK_SIZE, FakeEngine, key

from vllm_stateful.request.session_identity import scoped_salt, tenant_of
from vllm_stateful.types import Demotion, SessionKey


def session(api_key: str, name: str, salt: str | None = None) -> SessionKey:
    tenant = tenant_of({"x-api-key": api_key})
    return key(name, scoped_salt(tenant, salt))


def test_a_salt_for_each_session_does_not_take_another_key_s_only_one() -> None:
    engine = FakeEngine()
    victim = engine.kept(session("victim", "only one"), range(12 * BLOCK_SIZE))
    for number in range(4):
        for each in range(2):
            engine.kept(session(f"key-{number}", f"talk-{each}"), [each, *range(7 * BLOCK_SIZE)])
    salted = [
        engine.kept(session("many", f"talk-{n}", f"salt-{n}"), range(10 * BLOCK_SIZE))
        for n in range(40)
    ]
    for _ in range(38):
        engine.now += 1.0
        engine.store.demote_next(Demotion.PRESSURE, 10)
    assert victim.alive
    assert len(victim.blocks) == 12
    assert sum(each.alive for each in salted) == 2
    engine.check()


def test_salts_of_one_key_are_learned_from_together() -> None:
    """A conversation has a salt of its own, and waits as the others of its client do."""
    engine = FakeEngine()
    for number in range(30):
        talk = session("one", f"talk-{number}", f"salt-{number}")
        engine.turn(talk, range(20), tool="make")
        engine.now += 40.0
        engine.turn(talk, range(30), tool="make")
    own = engine.kept(session("one", "new", "salt-new"), range(20), tool="make")
    other = engine.kept(session("two", "new", "salt-new"), range(20), tool="make")
    assert own.forecast.rate(35.0) > other.forecast.rate(35.0)
