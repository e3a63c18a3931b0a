# SPDX-License-Identifier: Apache-2.0
"""The patch where a step's batch is made, on the installed vLLM: see ``test_patched.py``."""

import dataclasses
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_stateful.compat.ledger import patch_of

pytestmark = pytest.mark.usefixtures("stock_vllm")


class Stopped(Exception):
    """The rest of the method wants a device."""


class Runner:
    """As far as `prepare_inputs` gets without one."""

    @property
    def input_buffers(self) -> Any:
        raise Stopped


def test_worker_batch_hook_is_told_of_a_batch_when_it_is_whole() -> None:
    seen: list[Any] = []
    patch_of("worker-batch").calls[0].set(lambda batch, step: seen.append((batch, step)))
    patch_of("worker-batch").apply()
    state, desc = SimpleNamespace(num_tokens=1), SimpleNamespace(num_tokens=1)
    with pytest.raises(Stopped):
        GPUModelRunner.prepare_inputs(Runner(), "step", state, desc, 0)
    assert not seen

    def prepare_inputs(self: Any, step: Any, state: Any, desc: Any, num_active_loras: Any) -> Any:
        return (step, state, desc, num_active_loras)

    patch = patch_of("worker-batch")
    wrapped = patch.wrap(prepare_inputs, *patch.calls)
    batch = wrapped(Runner(), "step", state, desc, num_active_loras=3)
    assert batch == ("step", state, desc, 3)
    assert seen == [(batch, "step")]


def test_stock_gives_a_builder_rows_and_not_their_requests() -> None:
    names = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    assert "req_idx" in names  # what the adapter knows a batch by
    assert not names & {"req_ids", "scheduler_output", "shared_prefixes"}
    assert {"req_ids", "idx_mapping_np"} <= {field.name for field in dataclasses.fields(InputBatch)}


def test_stock_scheduler_says_what_all_requests_share_and_nothing_of_some() -> None:
    names = {field.name for field in dataclasses.fields(SchedulerOutput)}
    assert {name for name in names if "prefix" in name} == {"num_common_prefix_blocks"}
