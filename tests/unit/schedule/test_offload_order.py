# SPDX-License-Identifier: Apache-2.0
"""Which chunks leave an offload tier, and who is taken in."""

import hypothesis.strategies as st
from hypothesis import given

from vllm_stateful.schedule.gaps import Forecast, GapModel, Wait, WaitKind
from vllm_stateful.schedule.offload_order import OffloadOrder, Owner, WorkingSet

ALICE, BOB, CAROL = Owner("alice"), Owner("bob"), Owner("carol")
GAPS = GapModel()


def expect(kind: WaitKind) -> Forecast:
    return GAPS.forecast(None, Wait(kind))


def always(_: object) -> bool:
    return True


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def order_of(**chunks: str) -> OffloadOrder[str]:
    """An order in which each named session ended a turn with these chunks (one letter each)."""
    order: OffloadOrder[str] = OffloadOrder(100, Clock())
    for name, keys in chunks.items():
        for key in keys:
            if key not in order._num_claims:
                order.stored(key)
        order.used(Owner(name), keys)
    return order


def test_the_session_that_is_expected_back_last_goes_first_from_its_end() -> None:
    order = order_of(alice="abc", bob="def")
    order.waits(ALICE, expect(WaitKind.TOOL))
    order.waits(BOB, expect(WaitKind.USER))
    assert order.take(4, always) == ["f", "e", "d", "c"]


def test_a_chunk_that_two_sessions_have_goes_with_the_second() -> None:
    order = order_of(alice="sab", bob="scd")
    order.waits(ALICE, expect(WaitKind.TOOL))
    order.waits(BOB, expect(WaitKind.USER))
    assert order.take(2, always) == ["d", "c"]
    assert order.take(3, always) == ["b", "a", "s"]


def test_what_a_closed_session_alone_had_goes_before_all_others() -> None:
    order = order_of(alice="sab", bob="scd")
    order.waits(BOB, expect(WaitKind.ONE_SHOT))
    order.ended(ALICE)
    assert sorted(order.take(2, always)) == ["a", "b"]
    assert order.take(1, always) == ["d"]


def test_what_an_edit_left_behind_goes_before_the_rest_of_the_session() -> None:
    order = order_of(alice="abcd")
    order.stored("x")
    order.used(ALICE, "abx")
    assert order.take(5, always) == ["d", "c", "x", "b", "a"]


def test_what_four_turns_did_not_use_is_nobody_s() -> None:
    order = order_of(alice="abcd", bob="xy")
    order.waits(BOB, expect(WaitKind.ONE_SHOT))
    for _ in range(3):
        order.used(ALICE, "ab")
    assert order.take(1, always) == ["y"]
    order.used(ALICE, "ab")
    assert sorted(order.take(2, always)) == ["c", "d"]


def test_chunks_of_running_turns_go_last_and_oldest_first() -> None:
    order = order_of(alice="ab")
    order.stored("x")
    order.stored("y")
    assert order.take(4, always) == ["b", "a", "x", "y"]


def test_chunks_that_cannot_go_now_stay_with_their_session() -> None:
    order = order_of(alice="abc", bob="de")
    order.waits(ALICE, expect(WaitKind.USER))
    order.waits(BOB, expect(WaitKind.TOOL))
    assert order.take(3, lambda key: key not in "bc") == ["a", "e", "d"]
    assert order.take(2, always) == ["c", "b"]


def test_a_wish_counts_more_than_what_is_expected() -> None:
    order = order_of(alice="ab", bob="cd")
    order.waits(ALICE, expect(WaitKind.ONE_SHOT), wished_until_s=300.0)
    order.waits(BOB, expect(WaitKind.TOOL))
    assert order.take(2, always) == ["d", "c"]


def test_a_tenant_with_more_than_its_part_gives_first() -> None:
    order = order_of()
    for tenant, keys in (("big", "abcdef"), ("small", "xy")):
        for key in keys:
            order.stored(key)
        order.used(Owner(tenant, tenant), keys)
    order.waits(Owner("big", "big"), expect(WaitKind.TOOL))
    order.waits(Owner("small", "small"), expect(WaitKind.ONE_SHOT))
    assert set(order.take(3, always)) <= set("abcdef")


def test_a_failed_store_leaves_nothing_behind() -> None:
    order = order_of(alice="ab")
    order.removed("b")
    assert len(order) == 1
    assert order.take(1, always) == ["a"]


def test_a_session_is_taken_in_if_it_comes_back_sooner_than_the_one_that_would_go() -> None:
    order = order_of(alice="ab")
    order.waits(ALICE, expect(WaitKind.USER))
    order.waits(BOB, expect(WaitKind.TOOL))
    order.waits(CAROL, expect(WaitKind.ONE_SHOT))
    assert order.beats_victim(BOB)
    assert not order.beats_victim(CAROL)
    assert order.beats_victim(Owner("new"))
    assert not order.beats_victim(Owner("new"), expect(WaitKind.ONE_SHOT))
    order.ended(ALICE)
    assert order.beats_victim(CAROL)  # what nobody claims goes first


def test_the_working_set_is_what_is_expected_back() -> None:
    working_set = WorkingSet(1000)
    working_set.waits("a", 1000, 0.9, 0.0)
    working_set.waits("b", 1000, 0.2, 10.0)
    assert abs(working_set.ratio - 1.1) < 1e-9
    working_set.waits("a", 2000, 0.5, 20.0)
    assert abs(working_set.ratio - 1.2) < 1e-9
    working_set.ended("a")
    assert abs(working_set.ratio - 0.2) < 1e-9
    working_set.waits("c", 1000, 0.5, 10_000.0)  # b is silent for too long
    assert abs(working_set.ratio - 0.5) < 1e-9


KEYS = st.integers(0, 12)
ACTIONS = st.one_of(
    st.tuples(st.just("stored"), KEYS),
    st.tuples(st.just("used"), st.sampled_from("abc"), st.lists(KEYS, unique=True, max_size=8)),
    st.tuples(st.just("waits"), st.sampled_from("abc"), st.sampled_from(list(WaitKind))),
    st.tuples(st.just("ended"), st.sampled_from("abc")),
    st.tuples(st.just("removed"), KEYS),
    st.tuples(st.just("take"), st.integers(0, 12), st.sets(KEYS)),
    st.tuples(st.just("time"), st.floats(0, 1000)),
)


class Naive:
    """Sets only: what is here, and who has claims to what."""

    def __init__(self) -> None:
        self.here: set[int] = set()
        self.claims: dict[str, set[int]] = {name: set() for name in "abc"}
        self.was_claimed: set[int] = set()

    def claimed(self) -> set[int]:
        return set().union(*self.claims.values())


@given(st.lists(ACTIONS, max_size=60))
def test_any_order_of_events_agrees_with_sets(actions: list[tuple]) -> None:  # type: ignore[type-arg]
    clock, naive = Clock(), Naive()
    order: OffloadOrder[int] = OffloadOrder(13, clock)
    for name, *arguments in actions:
        if name == "time":
            clock.now_s += arguments[0]
        elif name == "stored" and arguments[0] not in naive.here:
            order.stored(arguments[0])
            naive.here.add(arguments[0])
        elif name == "used":
            order.used(Owner(arguments[0]), arguments[1])
            naive.claims[arguments[0]] |= naive.here & set(arguments[1])
            naive.was_claimed |= naive.claims[arguments[0]]
            kept = claimed_by(order, arguments[0])  # what it did not use for long is given up
            assert naive.here & set(arguments[1]) <= kept <= naive.claims[arguments[0]]
            naive.claims[arguments[0]] = kept
        elif name == "waits":
            order.waits(Owner(arguments[0]), expect(arguments[1]))
        elif name == "ended":
            order.ended(Owner(arguments[0]))
            naive.claims[arguments[0]] = set()
        elif name == "removed" and arguments[0] in naive.here:
            order.removed(arguments[0])
            forget(naive, {arguments[0]})
        elif name == "take":
            take_and_compare(order, naive, *arguments)
        compare(order, naive)


def take_and_compare(order: OffloadOrder[int], naive: Naive, num: int, fixed: set[int]) -> None:
    """It takes as many as it was asked for, orphans first and those of running turns last."""
    free = naive.here - fixed
    num = min(num, len(free))
    orphans = (free & naive.was_claimed) - naive.claimed()
    running = free - naive.was_claimed
    taken = order.take(num, lambda key: key not in fixed)
    assert len(set(taken)) == len(taken) == num
    assert set(taken) <= free
    assert set(taken[: len(orphans)]) <= orphans
    assert len(running & set(taken)) == max(0, num - len(free - running))
    forget(naive, set(taken))
    for name, claims in naive.claims.items():  # it may have given up its claim to what others have
        claims &= claimed_by(order, name)


def forget(naive: Naive, keys: set[int]) -> None:
    naive.here -= keys
    naive.was_claimed -= keys
    for claims in naive.claims.values():
        claims -= keys


def claimed_by(order: OffloadOrder[int], name: str) -> set[int]:
    claim = order._claims.get(Owner(name))
    return set() if claim is None else set(claim.keys)


def compare(order: OffloadOrder[int], naive: Naive) -> None:
    assert set(order._num_claims) == naive.here
    for name, claims in naive.claims.items():
        assert claimed_by(order, name) == claims
        assert (Owner(name) in order._queue._held) == bool(claims)
    for key, num in order._num_claims.items():
        assert num == sum(key in claims for claims in naive.claims.values())
    assert set(order._orphans) == (naive.here & naive.was_claimed) - naive.claimed()
    assert set(order._running) == naive.here - naive.was_claimed
