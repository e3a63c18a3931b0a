# SPDX-License-Identifier: Apache-2.0
"""Several tenants share what may be kept."""

from hypothesis import given
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
