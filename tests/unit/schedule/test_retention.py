# SPDX-License-Identifier: Apache-2.0
"""Who gives its blocks back first."""

import hypothesis.strategies as st
from hypothesis import given

from vllm_stateful.schedule.retention import RetentionQueue, Worth


def drain(queue: RetentionQueue[str], keep: str | None = None) -> list[str]:
    order = []
    while (victim := queue.next_victim(keep)) is not None:
        order.append(victim)
        queue.discard(victim)
    return order


def three_classes() -> RetentionQueue[str]:
    queue: RetentionQueue[str] = RetentionQueue()
    queue.add("session-old", Worth.SESSION, 1.0)
    queue.add("one-shot-old", Worth.ONE_SHOT, 2.0)
    queue.add("superseded", Worth.SUPERSEDED, 3.0)
    queue.add("session-new", Worth.SESSION, 4.0)
    queue.add("one-shot-new", Worth.ONE_SHOT, 5.0)
    return queue


ORDER = ["superseded", "one-shot-old", "one-shot-new", "session-old", "session-new"]


def test_classes_are_ordered_worst_first() -> None:
    assert Worth.SUPERSEDED < Worth.ONE_SHOT < Worth.SESSION


def test_worse_classes_go_first_and_within_a_class_the_oldest() -> None:
    assert drain(three_classes()) == ORDER


def test_an_empty_queue_has_no_victim() -> None:
    queue: RetentionQueue[str] = RetentionQueue()
    assert queue.next_victim() is None
    assert len(queue) == 0


def test_asking_for_a_victim_does_not_take_it_out() -> None:
    queue = three_classes()
    assert queue.next_victim() == queue.next_victim() == "superseded"
    assert len(queue) == 5


def test_keep_spares_one_wherever_it_stands() -> None:
    for kept in ORDER:
        assert drain(three_classes(), keep=kept) == [item for item in ORDER if item != kept]


def test_keep_that_is_not_in_the_queue_changes_nothing() -> None:
    assert drain(three_classes(), keep="stranger") == ORDER


def test_adding_again_moves_to_the_back() -> None:
    queue = three_classes()
    queue.add("session-old", Worth.SESSION, 6.0)
    assert drain(queue)[-2:] == ["session-new", "session-old"]


def test_adding_again_under_another_class_moves_there_and_counts_once() -> None:
    queue = three_classes()
    queue.add("session-new", Worth.SUPERSEDED, 6.0)
    assert len(queue) == 5
    assert drain(queue)[:2] == ["superseded", "session-new"]


def test_discard_of_a_stranger_is_a_no_op() -> None:
    queue = three_classes()
    queue.discard("stranger")
    assert len(queue) == 5


def test_expired_are_those_used_before_the_deadline_oldest_first_in_each_class() -> None:
    queue = three_classes()
    assert queue.expired(1.0) == []
    assert queue.expired(1.5) == ["session-old"]
    assert queue.expired(4.0) == ["superseded", "one-shot-old", "session-old"]
    assert queue.expired(100.0) == ORDER
    assert len(queue) == 5


def test_adding_again_renews_the_deadline() -> None:
    queue = three_classes()
    queue.add("session-old", Worth.SESSION, 6.0)
    assert queue.expired(5.0) == ["superseded", "one-shot-old", "session-new"]


@given(
    adds=st.lists(st.tuples(st.integers(0, 5), st.sampled_from(Worth), st.booleans()), max_size=30),
    deadline=st.integers(0, 30),
)
def test_order_equals_sorting_by_class_and_last_use(
    adds: list[tuple[int, Worth, bool]], deadline: int
) -> None:
    queue: RetentionQueue[str] = RetentionQueue()
    model: dict[str, tuple[Worth, int]] = {}
    for now, (number, worth, discard) in enumerate(adds):
        item = str(number)
        if discard:
            queue.discard(item)
            model.pop(item, None)
        else:
            queue.add(item, worth, float(now))
            model[item] = (worth, now)
    assert len(queue) == len(model)
    expected = sorted(model, key=lambda item: model[item])
    assert queue.expired(float(deadline)) == [i for i in expected if model[i][1] < deadline]
    assert drain(queue) == expected
