# SPDX-License-Identifier: Apache-2.0
"""Behind which token the states of a running request are, case by case.

What a scheduler really does is in `test_lifecycle_model.py`; what kernels really write in
`tests/model_runner_v2/test_states_v2.py`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_stateful.adapters.engine.answer_ends import AnswerEnds, end_ids
from vllm_stateful.adapters.engine.running_states import RunningStates
from vllm_stateful.adapters.slots import OnRequest, OnStep, of_step
from vllm_stateful.adapters.worker.ending_sampler import note_ends
from vllm_stateful.prefix.groups import FullGroup, StateGroup, WindowGroup

GROUPS = (FullGroup(16), StateGroup(16))


def request(computed: int, in_flight: int, prompt: int = 5, **seen: Any) -> Any:
    return SimpleNamespace(
        num_computed_tokens=computed,
        num_output_placeholders=in_flight,
        num_prompt_tokens=prompt,
        stateful=OnRequest(**seen),
    )


def of_drafts(num: int = 3, *, is_step_known: bool = True) -> RunningStates:
    return RunningStates(GROUPS, num, is_step_known=is_step_known)


@pytest.mark.parametrize("groups", [GROUPS, (FullGroup(16), WindowGroup(16, window=8))])
def test_without_drafts_it_is_all_that_was_scheduled(groups: Any) -> None:
    assert RunningStates(groups).position(request(20, 1)) == 20


def test_a_window_is_what_was_computed_beside_drafts_too() -> None:
    windows = RunningStates((FullGroup(16), WindowGroup(16, window=8)), 3)
    assert windows.position(request(20, 0)) == 20
    assert windows.are_known_in_answers


def test_a_step_in_flight_has_read_the_last_token() -> None:
    # 10 tokens are known; a step computes the last of them and three drafts
    assert of_drafts().position(request(13, 4, num_sampled=3)) == 10


def test_not_where_a_stop_took_tokens_back() -> None:
    assert of_drafts().position(request(13, 4, num_sampled=3, is_cut=True)) is None


def test_not_where_two_steps_are_in_flight() -> None:
    # an abort between the schedule of one step and the processing of the last one
    assert of_drafts().position(request(9, 5, num_steps=2)) is None
    assert of_drafts().position(request(9, 4, num_steps=1)) == 6


def test_not_where_several_steps_may_be_in_flight() -> None:
    assert of_drafts(is_step_known=False).position(request(13, 4, num_sampled=1)) is None
    assert not of_drafts(is_step_known=False).are_known_in_answers


@pytest.mark.parametrize("position", range(1, 40))
def test_not_where_a_step_may_end_in_the_next_block(position: int) -> None:
    found = of_drafts().position(request(position + 3, 4, num_sampled=1, prompt=0))
    is_inside = all((position + ahead - 1) // 16 == (position - 1) // 16 for ahead in range(1, 5))
    assert found == (position if is_inside else None)


def test_without_a_step_in_flight_the_last_one_must_have_sampled_one_token() -> None:
    assert of_drafts().position(request(9, 0, num_sampled=1)) == 9
    assert of_drafts().position(request(9, 0, num_sampled=2)) is None


@pytest.mark.parametrize("computed", [15, 16, 17])
def test_a_chunk_of_the_prompt_ends_anywhere(computed: int) -> None:
    assert of_drafts().position(request(computed, 0, prompt=40)) == computed
    # the chunk that ends the prompt is in flight: it will sample one token
    assert of_drafts().position(request(computed, 1, prompt=computed)) == computed


def sent(ends: AnswerEnds, num_tokens: int = 1) -> tuple[int, ...]:
    output = SimpleNamespace(total_num_scheduled_tokens=num_tokens)
    ends.step_begins(output)  # type: ignore[arg-type]
    return of_step(output).ends


def test_workers_are_told_once_in_a_step_that_reaches_them() -> None:
    ends = AnswerEnds([7, 3, 7])
    assert sent(ends, num_tokens=0) == ()
    assert sent(ends) == (3, 7)
    assert sent(ends) == ()
    assert sent(AnswerEnds([])) == ()


@pytest.mark.parametrize("of_model", [7, [7, 9], None])
def test_ends_are_those_of_the_model_not_of_a_client(of_model: Any) -> None:
    config = SimpleNamespace(
        try_get_generation_config=lambda: {"eos_token_id": [3, 7]},
        hf_config=SimpleNamespace(eos_token_id=of_model),
    )
    found = end_ids(config, SimpleNamespace(eos_token_id=5))
    assert found == {3, 5, 7, *(of_model if isinstance(of_model, list) else ())}
    bare = SimpleNamespace(try_get_generation_config=dict, hf_config=SimpleNamespace())
    assert end_ids(bare, None) == set()


def test_a_step_samples_nothing_behind_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(*_: Any) -> Any:
        return SimpleNamespace(
            sampled_token_ids=torch.tensor([[1, 7, 2], [7, 1, 1], [1, 2, 9], [1, 7, 7], [7, 9, 0]]),
            num_sampled=torch.tensor([3, 3, 3, 1, 0], dtype=torch.int32),
            num_rejected=torch.tensor([0, 0, 0, 2, 0], dtype=torch.int32),
            sampling_mask_tensors=None,
        )

    monkeypatch.setattr(RejectionSampler, "__call__", sample)
    sampler = object.__new__(RejectionSampler)
    runner = SimpleNamespace(rejection_sampler=sampler, device="cpu")
    note_ends(runner, SimpleNamespace(stateful=OnStep(ends=(7, 9))))
    output: Any = sampler(None, None)
    assert output.num_sampled.tolist() == [2, 1, 3, 1, 0]
    assert output.num_rejected.tolist() == [1, 2, 0, 2, 0]
    assert output.num_sampled.dtype == torch.int32


def test_a_sampler_of_another_kind_stays_as_it_is() -> None:
    for sampler in (None, object()):
        runner = SimpleNamespace(rejection_sampler=sampler, device="cpu")
        note_ends(runner, SimpleNamespace(stateful=OnStep(ends=(7,))))
        assert runner.rejection_sampler is sampler
