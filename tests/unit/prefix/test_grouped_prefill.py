# SPDX-License-Identifier: Apache-2.0
"""Who waits for whose prefill."""

import numpy as np
import pytest

from vllm_stateful.prefix import grouped_prefill
from vllm_stateful.prefix.grouped_prefill import PrefillGroups
from vllm_stateful.types import Identity

ME, OTHER = Identity("a"), Identity("b")
LONG = np.arange(100, dtype=np.int32)


class Play:
    """Prompts whose progress the test sets."""

    def __init__(self) -> None:
        self.done: dict[object, int] = {}
        self.groups = PrefillGroups(4, 8, lambda name: self.done.get(name, 0))

    def begins(self, name: str, identity: Identity = ME) -> None:
        self.done[name] = 8
        self.groups.begins(name, identity, LONG)

    def waits(self, name: str, num_shared: int, identity: Identity = ME, here: int = 0) -> bool:
        tokens = np.append(LONG[:num_shared], np.full(5, 7000 + num_shared, np.int32))
        return self.groups.waits(name, identity, tokens, lambda: here)


@pytest.fixture
def play() -> Play:
    return Play()


def test_it_waits_while_the_other_goes_on_and_joins_at_the_last_whole_block(play: Play) -> None:
    play.begins("first")
    for done in (8, 20, 40, 59):
        play.done["first"] = done
        assert play.waits("second", 62)
    play.done["first"] = 60
    assert not play.waits("second", 62)
    assert play.groups.num_joined == 1


def test_it_does_not_wait_for_one_that_stands_still(play: Play) -> None:
    play.begins("first")
    assert play.waits("second", 60)
    assert not play.waits("second", 60)
    assert play.groups.num_joined == 0


def test_it_does_not_wait_for_ever(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_prefill, "MAX_STEPS", 3)
    play.begins("first")
    steps = []
    for done in range(10, 16):
        play.done["first"] = done
        steps.append(play.waits("second", 80))
    assert steps[:4] == [True, True, True, False]


@pytest.mark.parametrize(
    ("num_shared", "identity", "here"), [(15, ME, 0), (60, OTHER, 0), (60, ME, 56), (0, ME, 0)]
)
def test_it_does_not_wait_for_little(
    play: Play, num_shared: int, identity: Identity, here: int
) -> None:
    play.begins("first")
    assert not play.waits("second", num_shared, identity, here)


def test_another_takes_the_place_of_one_that_is_gone(play: Play) -> None:
    play.begins("first")
    assert play.waits("second", 60)
    assert play.waits("third", 60)
    play.groups.ends(["first"])
    assert not play.waits("second", 60)
    play.begins("second")
    assert play.waits("third", 60)


def test_what_is_over_or_not_known_is_no_error(play: Play) -> None:
    play.begins("first")
    play.begins("first")
    play.groups.ends(["first", "stranger"])
    play.groups.forget("stranger")
    assert len(play.groups) == 0
    assert not play.waits("second", 60)
