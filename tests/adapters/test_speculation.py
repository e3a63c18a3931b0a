# SPDX-License-Identifier: Apache-2.0
"""What vLLM leaves out beside drafts is there beside drafts from sessions."""

from importlib.metadata import EntryPoint, EntryPoints
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.sampling_params import _SAMPLING_EPS, SamplingParams
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessor
from vllm.v1.worker import gpu_model_runner

from vllm_stateful.adapters import speculation
from vllm_stateful.adapters.speculation import (
    MIN_P,
    NAME,
    drafted_only,
    has_custom_processors,
    take_all_parameters,
    uses_logits_processors,
)
from vllm_stateful.compat.ledger import patch_of


class Custom(LogitsProcessor):
    """Changes nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        pass


def config(method: str | None, model: str = NAME, *, v2: bool = False) -> Any:
    drafting = None if method is None else SimpleNamespace(method=method, model=model)
    return SimpleNamespace(
        speculative_config=drafting,
        use_v2_model_runner=v2,
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        model_config=SimpleNamespace(logits_processors=None, enable_trace_replay=False),
    )


@pytest.fixture
def patched() -> Any:
    patch_of("worker-logits").apply()
    yield
    patch_of("worker-logits").undo()


def built(vllm_config: Any, custom: tuple[type, ...] = ()) -> list[type]:
    made = gpu_model_runner.build_logitsprocs(
        vllm_config, torch.device("cpu"), False, False, custom
    )
    return [type(each) for each in made.all]


@pytest.mark.usefixtures("patched")
def test_beside_drafts_from_sessions_all_processors_are_built() -> None:
    drafting = config("custom_class")
    assert set(built(drafting)) == set(BUILTIN_LOGITS_PROCESSORS)
    assert Custom in built(drafting, (Custom,))
    assert drafting.speculative_config is not None, "only the processors are built without"


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("other", [config("ngram"), config("custom_class", "another.Drafter")])
def test_beside_other_drafts_as_in_vllm(other: Any) -> None:
    assert len(built(other)) == 1
    with pytest.raises(ValueError, match="logits processors"):
        built(other, (Custom,))


@pytest.mark.parametrize("num_drafted", [[], [0], [0, 0], [0, 3]])
def test_only_a_step_with_drafts_is_verified(num_drafted: list[int]) -> None:
    metadata = SimpleNamespace(num_draft_tokens=num_drafted)
    assert drafted_only(metadata) is (metadata if sum(num_drafted) else None)
    assert drafted_only(None) is None


@pytest.mark.parametrize(
    ("drafting", "is_taken"),
    [
        (config("custom_class"), True),
        (config("ngram_gpu", v2=True), True),
        (config("ngram_gpu"), False),
        (config("custom_class", "another.Drafter"), False),
        (config("ngram"), False),
        (config("mtp", v2=True), False),
    ],
)
def test_only_where_sessions_draft_alone_every_parameter_is_taken(
    drafting: Any, is_taken: bool
) -> None:
    processor = SimpleNamespace(
        vllm_config=drafting, speculative_config=drafting.speculative_config
    )
    take_all_parameters(processor)
    assert (processor.speculative_config is None) == is_taken
    assert drafting.speculative_config is not None


def test_where_traces_may_be_forced_vllm_refuses_them_beside_drafts() -> None:
    drafting = config("ngram_gpu", v2=True)
    drafting.model_config.enable_trace_replay = True
    processor = SimpleNamespace(vllm_config=drafting, speculative_config=drafting)
    take_all_parameters(processor)
    assert processor.speculative_config is drafting


def test_which_requests_use_processors() -> None:
    assert MIN_P == _SAMPLING_EPS
    assert not uses_logits_processors(SamplingParams(temperature=0.5))
    assert not uses_logits_processors(SamplingParams(min_tokens=3, bad_words=["a"]))
    assert uses_logits_processors(SamplingParams(temperature=0.5, min_p=0.1))
    assert uses_logits_processors(SamplingParams(temperature=0, logit_bias={3: -100}))


def test_custom_processors_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    drafting = config("custom_class")
    assert not has_custom_processors(drafting.model_config)
    drafting.model_config.logits_processors = ["a.module:Custom"]
    assert has_custom_processors(drafting.model_config)
    drafting.model_config.logits_processors = None
    installed = EntryPoints([EntryPoint("custom", "a.module:Custom", "vllm.logits_processors")])
    monkeypatch.setattr(speculation, "entry_points", lambda **_: installed)
    assert has_custom_processors(drafting.model_config)
