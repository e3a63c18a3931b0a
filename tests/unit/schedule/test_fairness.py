# SPDX-License-Identifier: Apache-2.0
"""Several tenants share what may be kept."""

from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_stateful.schedule.fairness import MANY, FairQueue
from vllm_stateful.schedule.gaps import GapModel, Wait, WaitKind
from vllm_stateful.schedule.retention import Worth

MODEL = GapModel()
TOOL = MODEL.forecast("t", Wait(WaitKind.TOOL))
USER = MODEL.forecast("t", Wait(WaitKind.USER))


def add(
    queue: FairQueue[str],
    item: str,
    num_blocks: int,
    *,
    worth: Worth = Worth.LIVE,
    soon: bool = False,
    now_s: float = 0.0,
) -> None:
    """The first letter is the tenant."""
    forecast = TOOL if soon else USER
    queue.add(
        item, tenant=item[0], num_blocks=num_blocks, worth=worth, forecast=forecast, now_s=now_s
    )


def drain(queue: FairQueue[str], keep: str | None = None) -> list[str]:
    order = []
    while (victim := queue.next_victim(0.0, keep)) is not None:
        order.append(victim)
        queue.discard(victim)
    return order


def test_one_tenant_is_ordered_by_what_is_expected() -> None:
    queue: FairQueue[str] = FairQueue()
    add(queue, "a1", 10, soon=True)
    add(queue, "a2", 1)
    assert drain(queue) == ["a2", "a1"]
    assert len(queue) == 0


KEPT = st.tuples(
    st.sampled_from("abc"),
    st.integers(0, 2),
    st.integers(1, 20),
    st.sampled_from([0.0, 50.0, 500.0]),
    st.booleans(),
    st.booleans(),
)


@given(st.lists(KEPT, min_size=1, max_size=20))
def test_the_order_begins_with_the_next_victim(
    kept: list[tuple[str, int, int, float, bool, bool]],
) -> None:
    queue: FairQueue[int] = FairQueue(60)
    for number, (tenant, salt, num_blocks, until_s, soon, is_old) in enumerate(kept):
        queue.add(
            number,
            tenant=tenant,
            salt=salt,
            num_blocks=num_blocks,
            worth=Worth.LIVE,
            forecast=TOOL if soon else USER,
            now_s=float(number),
            wished_until_s=until_s,
        )
        if is_old:
            queue.supersede(number)
    order = queue.order(100.0)
    assert sorted(order) == list(range(len(kept)))
    assert order[0] == queue.next_victim(100.0)


def test_one_tenant_goes_in_the_order_that_is_told() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(12):
        add(queue, f"a{number}", 1 + number % 3, soon=number % 2 == 0, now_s=-float(number))
    queue.supersede("a4")
    assert queue.order(0.0) == drain(queue)


def test_who_holds_more_than_an_equal_part_gives_first() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(4):
        add(queue, f"a{number}", 10, soon=True, now_s=float(number))
    add(queue, "b0", 10)
    assert drain(queue)[:3] == ["a0", "a1", "a2"]


def test_at_equal_parts_the_least_expected_goes() -> None:
    queue: FairQueue[str] = FairQueue()
    add(queue, "a0", 10, soon=True)
    add(queue, "b0", 10)
    assert drain(queue) == ["b0", "a0"]


def test_superseded_ones_go_first_whoever_they_belong_to() -> None:
    queue: FairQueue[str] = FairQueue()
    add(queue, "a0", 90)
    add(queue, "b0", 1)
    queue.supersede("b0")
    queue.supersede("stranger")
    assert drain(queue) == ["b0", "a0"]


def test_one_that_is_spared_does_not_count_as_a_victim() -> None:
    queue: FairQueue[str] = FairQueue()
    add(queue, "a0", 90)
    add(queue, "b0", 1)
    assert drain(queue, keep="a0") == ["b0"]
    assert len(queue) == 1


def test_expired_of_all_tenants() -> None:
    queue: FairQueue[str] = FairQueue()
    add(queue, "a0", 1, now_s=1.0)
    add(queue, "b0", 1, now_s=2.0)
    add(queue, "a1", 1, now_s=3.0)
    assert queue.expired(2.5, 10.0) == ["a0", "b0"]


def test_a_wish_that_lasts_does_not_expire() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add(
        "a0",
        tenant="a",
        num_blocks=1,
        worth=Worth.LIVE,
        forecast=USER,
        now_s=0.0,
        wished_until_s=50.0,
    )
    add(queue, "a1", 1, now_s=1.0)
    assert queue.expired(20.0, 30.0) == ["a1"]
    assert queue.expired(29.0, 55.0) == ["a1"]
    assert queue.expired(40.0, 70.0) == ["a1", "a0"]


def wished(queue: FairQueue[str], item: str, num_blocks: int, *, soon: bool) -> None:
    queue.add(
        item,
        tenant=item[0],
        num_blocks=num_blocks,
        worth=Worth.LIVE,
        forecast=TOOL if soon else USER,
        now_s=0.0,
        wished_until_s=300.0,
    )


def test_wishes_count_while_all_of_them_fit() -> None:
    queue: FairQueue[str] = FairQueue(max_wished=10)
    wished(queue, "a0", 6, soon=False)
    add(queue, "a1", 6, soon=True)
    assert queue.next_victim(1.0) == "a1"
    wished(queue, "a2", 6, soon=True)
    assert queue.num_wished == 12
    assert queue.next_victim(1.0) == "a0"
    queue.shrink("a0", 4)
    assert queue.next_victim(1.0) == "a1"
    queue.discard("a0")
    assert queue.num_wished == 6


def test_what_gave_blocks_back_counts_for_less() -> None:
    queue: FairQueue[str] = FairQueue()
    add(queue, "a0", 90)
    add(queue, "b0", 60, now_s=1.0)
    queue.shrink("a0", 30)
    queue.shrink("stranger", 1)
    assert queue.next_victim(2.0) == "b0"


@given(
    items=st.dictionaries(
        st.from_regex(r"\A[abc][0-9]\Z"), st.tuples(st.integers(1, 9), st.booleans()), max_size=20
    )
)
def test_nobody_below_an_equal_part_gives_while_somebody_is_above(
    items: dict[str, tuple[int, bool]],
) -> None:
    queue: FairQueue[str] = FairQueue()
    held: dict[str, int] = {}
    for item, (num_blocks, soon) in items.items():
        add(queue, item, num_blocks, soon=soon)
        held[item[0]] = held.get(item[0], 0) + num_blocks
    left = dict(items)
    while (victim := queue.next_victim(0.0)) is not None:
        part = sum(held.values()) / len(held)
        assert held[victim[0]] > part or max(held.values()) <= part
        queue.discard(victim)
        held[victim[0]] -= left.pop(victim)[0]
        if not held[victim[0]]:
            del held[victim[0]]
    assert not left


def test_of_many_tenants_the_one_that_holds_most_gives_first() -> None:
    queue: FairQueue[tuple[int, int]] = FairQueue()
    for tenant in range(3 * MANY):
        for number in range(2):
            queue.add(
                (tenant, number),
                tenant=tenant,
                num_blocks=1 + (tenant == 7) * 9,
                worth=Worth.LIVE,
                forecast=USER,
                now_s=float(tenant),
            )
    order = []
    while (victim := queue.next_victim(1000.0, keep=(5, 0))) is not None:
        order.append(victim)
        queue.discard(victim)
    assert [tenant for tenant, _ in order[:2]] == [7, 7]
    assert len(order) == len(set(order)) == 6 * MANY - 1
    assert len(queue) == 1


# ---- salts of one tenant ---------------------------------------------------------------------


def enter(
    queue: FairQueue[str], item: str, tenant: str, salt: str | None, num_blocks: int, used_s: float
) -> None:
    queue.add(
        item,
        tenant=tenant,
        salt=salt,
        num_blocks=num_blocks,
        worth=Worth.LIVE,
        forecast=USER,
        now_s=used_s,
    )


def test_a_salt_for_each_session_does_not_turn_the_tenants_over() -> None:
    """The victim keeps more than any salt of the others, and less than any tenant."""
    queue: FairQueue[str] = FairQueue()
    enter(queue, "victim", "victim", None, 12, 0.0)
    for tenant in range(MANY):
        for number in range(2):
            enter(queue, f"{tenant}-{number}", f"tenant-{tenant}", None, 7, 1.0)
    for number in range(60):
        enter(queue, f"salted-{number}", "attacker", f"salt-{number}", 10, 2.0)
    for _ in range(58):
        gone = queue.next_victim(100.0)
        assert gone is not None
        assert gone.startswith("salted")
        queue.discard(gone)
    assert queue.rank("victim", 100.0)


def test_salts_of_one_conversation_each_change_nothing() -> None:
    """Their lengths differ; one that is longer does not go sooner for it."""
    plain: FairQueue[str] = FairQueue()
    salted: FairQueue[str] = FairQueue()
    for number in range(100):
        num_blocks, used_s = 1 + number * 37 % 101, float(number * 53 % 97)
        enter(plain, f"{number}", "a", None, num_blocks, used_s)
        enter(salted, f"{number}", "a", f"salt-{number}", num_blocks, used_s)
    order = drain(salted)
    assert len(order) == 100
    assert order == drain(plain)


def test_salts_of_several_sessions_share_within_their_tenant() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(4):
        enter(queue, f"a{number}", "", "a", 10, 10.0 + number)
    enter(queue, "b0", "", "b", 10, 0.0)
    assert drain(queue) == ["a0", "a1", "a2", "b0", "a3"]


def test_of_many_salts_one_keeps_no_more_than_a_quarter() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(10):
        enter(queue, f"flood-{number}", "", "flood", 10, 100.0)
    for number in range(6):
        enter(queue, f"calm-{number}", "", f"salt-{number}", 10, 0.0)
    order = drain(queue)
    assert all(item.startswith("flood") for item in order[:8])
    assert order[8].startswith("calm")


def test_what_was_superseded_goes_first_of_many_tenants_too() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(3 * MANY):
        enter(queue, f"{number}", f"tenant-{number}", None, 100 - number, 0.0)
    queue.supersede("11")
    queue.supersede("10")
    assert drain(queue, keep="11")[:2] == ["10", "0"]


@dataclass
class Kept:
    tenant: str
    salt: str
    num_blocks: int
    soon: bool
    used_s: float
    gives_half: bool


class Naive:
    """Looks at everything, every time."""

    def __init__(self, items: list[Kept]) -> None:
        self.items = dict(enumerate(items))
        self.superseded: list[int] = []

    def rank(self, number: int, now_s: float) -> tuple[float, float]:
        item = self.items[number]
        return (TOOL if item.soon else USER).rate(now_s - item.used_s), item.used_s

    def first_of(self, tenant: str, now_s: float, keep: int) -> int | None:
        held: Counter[str] = Counter()
        num: Counter[str] = Counter()
        own = {n: item for n, item in self.items.items() if item.tenant == tenant}
        for item in own.values():
            held[item.salt] += item.num_blocks
            num[item.salt] += 1
        part = held.total() / min(MANY, len(held))
        above = [n for n in own if held[own[n].salt] > part and num[own[n].salt] > 1]
        return min(
            (n for n in above or own if n != keep),
            key=lambda number: self.rank(number, now_s),
            default=None,
        )

    def allowed(self, now_s: float, keep: int) -> set[int | None]:
        """Those that may go: one, but where it depends on who is among the largest."""
        if given := [number for number in self.superseded if number != keep]:
            return {given[0]}
        held: Counter[str] = Counter()
        for item in self.items.values():
            held[item.tenant] += item.num_blocks
        if not held:
            return {None}
        least = sorted(held.values(), reverse=True)[:MANY][-1]
        seen = {tenant for tenant in held if held[tenant] >= least}
        surely = {t for t in held if held[t] > least} if len(seen) > MANY else seen
        firsts = {t: first for t in seen if (first := self.first_of(t, now_s, keep)) is not None}
        if above := {t for t in firsts if held[t] > held.total() / len(held)}:
            firsts = {t: firsts[t] for t in above}
        sure = [self.rank(firsts[t], now_s) for t in firsts if t in surely]
        best = min(sure, default=(float("inf"), 0.0))
        return {n for n in firsts.values() if self.rank(n, now_s) <= best} or {None}


KEPT = st.builds(
    Kept,
    tenant=st.sampled_from("abcdefg"),
    salt=st.sampled_from("pqrstu"),
    num_blocks=st.integers(1, 9),
    soon=st.booleans(),
    used_s=st.just(0.0),
    gives_half=st.booleans(),
)


@settings(max_examples=200, deadline=None)
@given(
    items=st.lists(KEPT, max_size=28),
    superseded=st.lists(st.integers(0, 27), unique=True, max_size=3),
    keep=st.integers(-1, 27),
)
def test_every_victim_is_one_that_a_look_at_everything_allows(
    items: list[Kept], superseded: list[int], keep: int
) -> None:
    queue: FairQueue[int] = FairQueue()
    for number, item in enumerate(items):
        item.used_s = float(number)
        queue.add(
            number,
            tenant=item.tenant,
            salt=item.salt,
            num_blocks=item.num_blocks,
            worth=Worth.LIVE,
            forecast=TOOL if item.soon else USER,
            now_s=item.used_s,
        )
    naive = Naive(items)
    for number in superseded:
        queue.supersede(number)
        if number in naive.items:
            naive.superseded.append(number)
    now_s = 30.0
    while True:
        victim = queue.next_victim(now_s, keep)
        assert victim in naive.allowed(now_s, keep)
        if victim is None:
            break
        now_s += 7.0
        item = naive.items[victim]
        if item.gives_half and item.num_blocks > 1:
            item.gives_half, item.num_blocks = False, item.num_blocks // 2
            queue.shrink(victim, item.num_blocks)
            continue
        queue.discard(victim)
        del naive.items[victim]
        if victim in naive.superseded:
            naive.superseded.remove(victim)
    assert len(queue) == len(naive.items) == (keep in naive.items)
