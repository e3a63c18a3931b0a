# SPDX-License-Identifier: Apache-2.0
"""Who gives its blocks back first."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_stateful.schedule.gaps import NUM_BINS, Forecast, bin_of
from vllm_stateful.schedule.retention import RetentionQueue, Worth


def returns_after(seconds: float, share: float = 0.9) -> Forecast:
    """A session that returns then, or never."""
    shares = np.zeros(NUM_BINS + 1)
    shares[bin_of(seconds)], shares[-1] = share, 1 - share
    return Forecast(shares)


SOON, LATE = returns_after(10.0), returns_after(1000.0)


def drain(queue: RetentionQueue[str], now_s: float, keep: str | None = None) -> list[str]:
    order = []
    while (victim := queue.next_victim(now_s, keep)) is not None:
        order.append(victim)
        queue.discard(victim)
    return order


def five() -> RetentionQueue[str]:
    queue: RetentionQueue[str] = RetentionQueue()
    queue.add("soon-old", Worth.LIVE, SOON, 1.0)
    queue.add("late-old", Worth.LIVE, LATE, 2.0)
    queue.add("superseded", Worth.SUPERSEDED, SOON, 3.0)
    queue.add("soon-new", Worth.LIVE, SOON, 4.0)
    queue.add("late-new", Worth.LIVE, LATE, 5.0)
    return queue


ORDER = ["superseded", "late-new", "late-old", "soon-new", "soon-old"]
"""After 5 s: of two that return after the same time, the one that has waited longer is nearer."""


def test_superseded_ones_go_first_then_those_expected_last() -> None:
    assert drain(five(), 5.0) == ORDER


def test_the_order_changes_while_they_wait() -> None:
    """One that should have been back long ago is not expected any more."""
    order = drain(five(), 60.0)
    assert order[0] == "superseded"
    assert set(order[1:3]) == {"soon-old", "soon-new"}


def test_an_empty_queue_has_no_victim() -> None:
    queue: RetentionQueue[str] = RetentionQueue()
    assert queue.next_victim(0.0) is None
    assert len(queue) == 0


def test_asking_for_a_victim_does_not_take_it_out() -> None:
    queue = five()
    assert queue.next_victim(5.0) == queue.next_victim(5.0) == "superseded"
    assert len(queue) == 5


def test_keep_spares_one_wherever_it_stands() -> None:
    for kept in ORDER:
        assert drain(five(), 5.0, keep=kept) == [item for item in ORDER if item != kept]
    assert drain(five(), 5.0, keep="stranger") == ORDER


def test_adding_again_counts_once_and_begins_a_new_wait() -> None:
    queue = five()
    queue.add("soon-old", Worth.LIVE, SOON, 60.0)
    assert len(queue) == 5
    order = drain(queue, 60.0)
    assert order[:2] == ["superseded", "soon-new"]
    assert order[-1] == "soon-old"


def test_one_that_is_superseded_later_goes_first() -> None:
    queue = five()
    queue.supersede("soon-new")
    queue.supersede("stranger")
    assert drain(queue, 5.0)[:2] == ["superseded", "soon-new"]


def test_discard_of_a_stranger_is_a_no_op() -> None:
    queue = five()
    queue.discard("stranger")
    assert len(queue) == 5


def test_wished_ones_go_last_until_their_wish_is_over() -> None:
    queue = five()
    queue.add("late-new", Worth.LIVE, LATE, 5.0, wished_until_s=50.0)
    queue.add("late-old", Worth.LIVE, LATE, 5.0, wished_until_s=40.0)
    assert set(drain(queue, 5.0)[-2:]) == {"late-old", "late-new"}
    queue = five()
    queue.add("late-new", Worth.LIVE, LATE, 5.0, wished_until_s=5.5)
    assert queue.rank("late-new", 5.1)[0] is Worth.WISHED
    assert drain(queue, 6.0)[1] == "late-new"


def test_a_wished_history_that_was_edited_away_goes_first() -> None:
    queue = five()
    queue.add("soon-old", Worth.LIVE, SOON, 5.0, wished_until_s=50.0)
    queue.supersede("soon-old")
    assert set(drain(queue, 5.0)[:2]) == {"superseded", "soon-old"}


FORECASTS = [returns_after(s, share) for s in (1.0, 30.0, 2000.0) for share in (0.3, 0.99)]


class QueueModel(RuleBasedStateMachine):
    """Against sorting all of them by what they are worth now."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: RetentionQueue[int] = RetentionQueue()
        self.model: dict[int, tuple[bool, Forecast, float, float]] = {}
        self.now_s = 0.0

    @rule(
        item=st.integers(0, 9),
        worth=st.sampled_from([Worth.SUPERSEDED, Worth.LIVE]),
        forecast=st.sampled_from(FORECASTS),
        wish_s=st.sampled_from([0.0, 5.0, 300.0]),
    )
    def add(self, item: int, worth: Worth, forecast: Forecast, wish_s: float) -> None:
        until_s = self.now_s + wish_s
        self.queue.add(item, worth, forecast, self.now_s, until_s)
        self.model[item] = (worth is Worth.SUPERSEDED, forecast, self.now_s, until_s)

    @rule(item=st.integers(0, 9))
    def discard(self, item: int) -> None:
        self.queue.discard(item)
        self.model.pop(item, None)

    @rule(item=st.integers(0, 9))
    def supersede(self, item: int) -> None:
        self.queue.supersede(item)
        if item in self.model:
            self.model[item] = (True, *self.model[item][1:])

    @rule(seconds=st.sampled_from([0.1, 1.0, 7.0, 100.0, 5000.0, 90000.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(keep=st.integers(-1, 9))
    def take(self, keep: int) -> None:
        victim = self.queue.next_victim(self.now_s, keep)
        others = {item: self.key(item) for item in self.model if item != keep}
        assert (victim is None) == (not others)
        if victim is not None:
            assert others[victim] == min(others.values())

    def key(self, item: int) -> tuple[Worth, float, float]:
        superseded, forecast, used_s, until_s = self.model[item]
        if superseded:
            return Worth.SUPERSEDED, 0.0, 0.0
        worth = Worth.WISHED if until_s > self.now_s else Worth.LIVE
        return worth, forecast.rate(self.now_s - used_s), used_s

    @invariant()
    def holds_the_same(self) -> None:
        assert len(self.queue) == len(self.model)
        assert all(item in self.queue for item in self.model)


TestQueueModel = QueueModel.TestCase
TestQueueModel.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_of_many_a_sample_is_looked_at_and_superseded_ones_still_go_first() -> None:
    """Each victim is among the worst tenth of those that are left."""
    queue: RetentionQueue[int] = RetentionQueue()
    for number in range(2000):
        queue.add(number, Worth.LIVE, FORECASTS[number % len(FORECASTS)], number / 10)
    queue.add(-1, Worth.SUPERSEDED, SOON, 200.0)
    for _ in range(500):
        victim = queue.next_victim(200.0)
        assert victim is not None
        left = sorted(queue.rank(item, 200.0) for item in range(-1, 2000) if item in queue)
        assert queue.rank(victim, 200.0) <= left[len(left) // 10]
        queue.discard(victim)
    assert -1 not in queue
