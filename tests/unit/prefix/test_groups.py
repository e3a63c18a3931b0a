# SPDX-License-Identifier: Apache-2.0
"""What each kind of group needs at a position, against what its tokens attend to."""

from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from vllm_stateful.prefix import demoting
from vllm_stateful.prefix.groups import (
    ChunkGroup,
    FullGroup,
    Group,
    ResumePoint,
    StateGroup,
    Table,
    WindowGroup,
)
from vllm_stateful.prefix.groups.table import joined_blocks, joined_ids
from vllm_stateful.prefix.residency_store import ResidencyStore

SIZES = st.integers(1, 9)
POSITIONS = st.integers(1, 200)


class Block:
    def __init__(self, block_id: int) -> None:
        self.block_id = block_id


def needed(group: Group, position: int, first_read: int) -> range:
    """The blocks that hold the tokens from one on, up to the position."""
    return range(first_read // group.block_size, -(-position // group.block_size))


@given(size=SIZES, position=POSITIONS)
def test_full_attention_needs_all_blocks(size: int, position: int) -> None:
    group = FullGroup(size)
    assert range(group.first(position), group.end(position)) == needed(group, position, 0)


@given(size=SIZES, position=POSITIONS, window=st.integers(1, 50))
def test_a_window_needs_the_tokens_that_the_next_one_attends_to(
    size: int, position: int, window: int
) -> None:
    group = WindowGroup(size, window=window)
    first_read = max(0, position - window + 1)
    found = range(group.first(position), group.end(position))
    assert list(found) == list(needed(group, position, first_read))


@given(size=SIZES, position=POSITIONS, chunk=st.integers(1, 50))
def test_a_chunk_needs_the_tokens_before_in_the_chunk(size: int, position: int, chunk: int) -> None:
    group = ChunkGroup(size, chunk=chunk)
    found = range(group.first(position), group.end(position))
    assert list(found) == list(needed(group, position, position // chunk * chunk))


@given(size=SIZES, position=POSITIONS)
def test_a_state_needs_the_block_of_the_last_token(size: int, position: int) -> None:
    group = StateGroup(size)
    found = range(group.first(position), group.end(position))
    assert list(found) == [(position - 1) // size]


@given(size=SIZES, position=POSITIONS, ahead=st.integers(0, 3), kind=st.integers(0, 3))
def test_what_is_kept_ends_a_lookahead_earlier(
    size: int, position: int, ahead: int, kind: int
) -> None:
    def made(lookahead: int) -> Group:
        kinds: list[Group] = [
            FullGroup(size, lookahead=lookahead),
            WindowGroup(size, window=7, lookahead=lookahead),
            ChunkGroup(size, chunk=5, lookahead=lookahead),
            StateGroup(size, lookahead=lookahead),
        ]
        return kinds[kind]

    plain, with_head = made(0), made(ahead)
    assert with_head.end(position + ahead) == plain.end(position)
    assert with_head.first(position + ahead) == plain.first(position)


def test_a_table_gives_up_its_end() -> None:
    blocks = [Block(n) for n in (5, 6, 7, 8)]
    table = Table.of(blocks, 2, known=Table.of(blocks[:2]).ids)
    assert table.ids.tolist() == [5, 6, 7, 8]
    given_up = table.keep(3)
    assert (table.start, table.ids.tolist(), len(table.blocks)) == (2, [5, 6, 7], 3)
    assert (given_up.start, given_up.ids.tolist()) == (5, [8])
    both = (table, Table.empty(), given_up)
    assert joined_ids(both).tolist() == [5, 6, 7, 8]
    assert [block.block_id for block in joined_blocks(both)] == [5, 6, 7, 8]


@pytest.mark.parametrize("start", [10, 23, 38])
def test_each_of_several_full_groups_gives_blocks_up_to_a_message(
    start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that begins in the last block is no place to stop: nothing would be given."""
    monkeypatch.setattr(demoting, "MIN_GIVEN_TOKENS", 4)
    groups = [FullGroup(4), FullGroup(4)]
    store = ResidencyStore(4, 100, 100, lambda _: None, lambda: 0.0, groups=groups)
    parent = SimpleNamespace(values=[], children={0: None})
    nodes = [SimpleNamespace(start=place, is_cut=True, parent=parent) for place in (start, 0)]
    blocks = [Block(number) for number in range(10)]
    victim: Any = SimpleNamespace(
        tables=(Table.of(blocks), Table.of(blocks)),
        num_blocks=20,
        tree=SimpleNamespace(own_tail=lambda _: iter(nodes)),
    )
    kept = store._end_of_rest(victim, 2)
    assert kept == (-(-start // 4) * 4 if start < 36 else 0)


def test_the_points_that_are_kept_are_the_last_two_a_question_and_where_others_start() -> None:
    released: list[int] = []
    store = ResidencyStore(
        4,
        100,
        100,
        lambda blocks: released.extend(block.block_id for block in blocks),
        lambda: 0.0,
        groups=[StateGroup(4)],
    )

    def point(number: int, **more: bool) -> ResumePoint:
        return ResumePoint(10 * number, (Table.of([Block(number)]),), **more)

    points = [
        point(1, is_shared=True),
        point(2, is_question=True),
        point(3, is_shared=True),
        point(4, is_question=True),
        point(5),
        point(6),
        point(7, is_answer=True),
        point(8, is_answer=True),
        point(9),
    ]
    kept = store._chosen(points)
    assert [each.position for each in kept] == [10, 40, 60, 70, 80, 90]
    assert sorted(released) == [2, 3, 5]
