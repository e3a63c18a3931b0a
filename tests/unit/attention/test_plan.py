# SPDX-License-Identifier: Apache-2.0
"""The cut of a step: each row meets each of its keys once, and the shares are even."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_cover import check_cover

from vllm_stateful.attention.plan import Shape, SharedPrefix, make_plan


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[int], Shape, list[SharedPrefix], int]:
    """New lengths, total lengths, what a kernel takes, shared prefixes, window."""
    shape = Shape(
        num_ctas=draw(st.integers(1, 40)),
        tile_rows=draw(st.sampled_from((16, 64, 128))),
        block_keys=draw(st.sampled_from((32, 64, 128))),
        num_kv_heads=draw(st.integers(1, 3)),
        group_size=draw(st.sampled_from((1, 3, 4, 8))),
        overhead=draw(st.integers(0, 3)),
        least_cost=draw(st.integers(1, 8)),
    )
    lengths = st.tuples(st.integers(0, 60), st.integers(0, 700))
    pairs = draw(st.lists(lengths, max_size=7))
    new, cached = [a for a, _ in pairs], [b for _, b in pairs]
    able = [i for i, (a, b) in enumerate(pairs) if a and b >= 16]
    prefixes, window = [], 0
    if len(able) > 1 and draw(st.booleans()):
        most = min(cached[i] for i in able) // 16
        prefixes.append(SharedPrefix(tuple(able), 16 * draw(st.integers(1, most))))
    else:
        window = draw(st.sampled_from((0, 0, 5, 100)))
    return new, [a + b for a, b in pairs], shape, prefixes, window


@given(steps())
def test_every_row_and_key_exactly_once(
    step: tuple[list[int], list[int], Shape, list[SharedPrefix], int],
) -> None:
    check_cover(*step)


@given(steps())
def test_shares_are_even(
    step: tuple[list[int], list[int], Shape, list[SharedPrefix], int],
) -> None:
    new, total, shape, prefixes, window = step
    plan = make_plan(new, total, shape, prefixes=prefixes, window=window)
    blocks = plan.segments[:, 3] - plan.segments[:, 2]
    assert (blocks > 0).all()
    assert plan.cta_segments[0] == 0
    assert plan.cta_segments[-1] == len(plan.segments)
    assert (np.diff(plan.cta_segments) >= 0).all()
    # A tile is begun once for each item; a share that begins inside pays nothing again here.
    begun = (plan.segments[:, 4] == 0) | (plan.segments[:, 2] == 0)
    costs = blocks + shape.overhead * begun
    shares = np.add.reduceat(np.append(costs, 0), plan.cta_segments[:-1])
    shares[np.diff(plan.cta_segments) == 0] = 0
    used = min(shape.num_ctas, max(1, int(costs.sum()) // shape.least_cost))
    assert shares.max(initial=0) <= 1.1 * costs.sum() / used + 1 + shape.overhead


def test_a_long_step_is_even_within_a_tenth() -> None:
    shape = Shape(num_ctas=132, tile_rows=64, block_keys=64, num_kv_heads=8, group_size=4)
    new = [512, *range(1, 32)]
    total = [4096 * (1 + i % 8) + added for i, added in enumerate(new)]
    plan = make_plan(new, total, shape)
    blocks = plan.segments[:, 3] - plan.segments[:, 2]
    shares = np.add.reduceat(blocks, plan.cta_segments[:-1])
    assert shares.max() <= 1.1 * shares.mean()


@pytest.mark.parametrize(
    ("new", "total", "prefixes", "window"),
    [
        ([1, 2], [3], [], 0),
        ([5], [4], [], 0),
        ([-1], [4], [], 0),
        ([1, 1], [40, 40], [SharedPrefix((0, 1), 8)], 0),
        ([1, 1], [40, 16], [SharedPrefix((0, 1), 16)], 0),
        ([1, 1], [40, 40], [SharedPrefix((0, 0), 16)], 0),
        ([1, 1], [40, 40], [SharedPrefix((0, 1), 16), SharedPrefix((1,), 16)], 0),
        ([1, 1], [40, 40], [SharedPrefix((0, 1), 16)], 7),
        ([1, 0], [40, 40], [SharedPrefix((0, 1), 16)], 0),
    ],
)
def test_what_does_not_fit_is_said(
    new: list[int], total: list[int], prefixes: list[SharedPrefix], window: int
) -> None:
    with pytest.raises(ValueError, match=r"shared prefix|lengths|shorter"):
        make_plan(new, total, Shape(4, 64, 64, 1, 1), prefixes=prefixes, window=window)
