# SPDX-License-Identifier: Apache-2.0
"""When a step's plan is made, and where it lies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_stateful.attention import ops
from vllm_stateful.attention.choice import Graphs, Layers
from vllm_stateful.attention.plan import SharedPrefix, make_plan
from vllm_stateful.attention.step_plans import StepPlans

LLAMA = Layers(head_size=128, group_size=4, page_size=16, is_half_precision=True, capability=(8, 0))
NUM_CTAS, BLOCK = 12, 64


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "num_ctas", lambda *_, **__: NUM_CTAS)


def plans(graphs: Graphs = Graphs()) -> StepPlans:  # noqa: B008
    return StepPlans(LLAMA, graphs, 2, torch.bfloat16, 8, torch.device("cpu"))


def step(*sequences: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    new, cached = np.asarray(sequences, np.int32).T
    return new, new + cached


def test_a_plan_holds_until_a_sequence_fills_a_block() -> None:
    made = plans()
    first = made.of(*step((4, 1001), (4, 300)), 4)
    assert made.of(*step((4, 1024), (4, 320)), 4) is first
    assert made.num_made == 1
    made.of(*step((4, 1025), (4, 320)), 4)
    assert made.num_made == 2


@pytest.mark.parametrize(
    "other", [((3, 1001), (4, 300)), ((4, 1001),), ((4, 1001), (4, 300), (0, 0))]
)
def test_another_batch_has_another_plan(other: tuple[tuple[int, int], ...]) -> None:
    made = plans()
    made.of(*step((4, 1001), (4, 300)), 4)
    made.of(*step(*other), 4)
    assert made.num_made == 2


def test_it_is_that_of_lengths_up_to_whole_blocks() -> None:
    made = plans()
    new, total = step((4, 1001), (7, 300))
    found = made.of(new, total, 7)
    shape = made._shape(found.rows)
    expected = make_plan(new, new + np.asarray([1024, 320]), shape, exact=False)
    assert np.array_equal(found.segments.numpy(), expected.segments)
    assert np.array_equal(found.units.numpy(), expected.units)


def test_shared_prefixes_are_part_of_it() -> None:
    made = plans()
    new, total = step((4, 2000), (4, 2000))
    alone = made.of(new, total, 4)
    together = made.of(new, total, 4, [SharedPrefix((0, 1), 1024)])
    assert (len(alone.groups), len(together.groups), made.num_made) == (0, 2, 2)


def test_steps_of_a_graph_lie_in_one_place_and_others_elsewhere() -> None:
    made = plans(Graphs(most_query_len=5, are_ours=True))
    captured = made.of(*step((5, 0), (5, 0)), 5)
    other = made.of(*step((200, 1000)), 200)
    again = made.of(*step((5, 700), (5, 900), (0, 0)), 5)
    assert again is captured
    assert other is not captured
    assert other.cta_segments.data_ptr() != captured.cta_segments.data_ptr()
    short = made.of(*step((3, 700), (3, 900)), 3)
    assert (captured.rows, short.rows) == (32, 16)
    assert short.cta_segments.data_ptr() != captured.cta_segments.data_ptr()
    assert made.of(*step((3, 70_000), (1, 9)), 3) is short


def test_a_step_that_comes_back_is_copied_again_after_another() -> None:
    made = plans(Graphs(most_query_len=5, are_ours=True))
    first, second = step((5, 700)), step((5, 100_000))
    before = made.of(*first, 5).segments.clone()
    made.of(*second, 5)
    assert torch.equal(made.of(*first, 5).segments[:4], before[:4])
    assert made.num_made == 3
