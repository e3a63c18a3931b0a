# SPDX-License-Identifier: Apache-2.0
"""Who may read what another sequence of the same step writes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_stateful.attention.same_step import may_read_what_is_written

PAGE = 16
SEQUENCES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 100), st.booleans()), min_size=1, max_size=6
)


@given(SEQUENCES, st.integers(0, 20))
def test_it_is_never_missed(sequences: list[tuple[int, int, bool]], slack: int) -> None:
    """Each (writer, reader) and each page, for every true length within the bounds."""
    races = False
    for writer, (new_w, cached_w, _) in enumerate(sequences):
        for reader, (new_r, cached_r, is_new) in enumerate(sequences):
            if writer == reader or not (new_w and new_r and is_new):
                continue
            for true in range(max(0, cached_w - slack), cached_w + 1):
                filled = range(true // PAGE, (true + new_w) // PAGE)
                races |= any((page + 1) * PAGE <= cached_r for page in filled)
    found = may_read_what_is_written(
        [new for new, _, _ in sequences],
        [new + cached for new, cached, _ in sequences],
        PAGE,
        may_be_new=[is_new for _, _, is_new in sequences],
        slack=slack,
    )
    assert found or not races
    if not slack:
        assert found == races


def test_decoding_beside_a_new_turn_does_not_count_until_a_page_is_full() -> None:
    decodes_beside_new = [False, True]
    for cached, new_turn, races in ((100, 64, False), (111, 64, False), (111, 112, True)):
        found = may_read_what_is_written(
            [1, 20], [cached + 1, new_turn + 20], PAGE, may_be_new=decodes_beside_new
        )
        assert found == races
    assert not may_read_what_is_written([1, 20], [112, 132], PAGE, may_be_new=[False, False])


def test_alone_nobody_reads_from_another() -> None:
    assert not may_read_what_is_written([40], [40], PAGE)
    assert not may_read_what_is_written([40, 0], [140, 100], PAGE)
