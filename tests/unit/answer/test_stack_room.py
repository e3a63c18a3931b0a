# SPDX-License-Identifier: Apache-2.0
"""A block of the stack that is large enough, of a function that changes nothing else."""

import sys

import pytest

from vllm_stateful.answer.stack_room import with_room

SLOT = 8
BLOCK = 1 << 20
FRAME = 256
"""Bytes, of a small function."""


def test_it_hands_through_what_it_is_given() -> None:
    assert with_room(sorted, [1, 3, 2], reverse=True) == [3, 2, 1]
    with pytest.raises(ZeroDivisionError):
        with_room(divmod, 1, 0)


def test_the_rest_of_its_block_holds_all_frames_there_may_be() -> None:
    taken = with_room.__code__.co_stacksize * SLOT
    assert BLOCK // 2 < taken < BLOCK - sys.getrecursionlimit() * FRAME
