# SPDX-License-Identifier: Apache-2.0
"""Patches for the workers.

Each wrapper gets vLLM's function and our hooks (`Hook`), and returns the replacement.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch


def _staged_ids(original: Callable[..., Any], write: Hook) -> Callable[..., Any]:
    """Let model runner V2 take the ids of a prompt as an array, not only as a list of integers.

    ``write``: gets the table, a row, a column and the int32 array to write there.
    """

    def stage_write(self: Any, index: int, start: int, x: Any) -> None:
        if isinstance(x, np.ndarray):
            write(self, index, start, x)
        else:
            original(self, index, start, x)

    return stage_write


def _worker_speculator(original: Callable[..., Any], make: Hook) -> Callable[..., Any]:
    """Let model runner V2 draft with our speculator, not only with vLLM's own ones.

    ``make``: gets vLLM's function, its configuration, the device and the table of requests;
    returns the speculator.
    """

    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        return make(original, vllm_config, device, req_states)

    return init_speculator


def _worker_requests(original: Callable[..., Any], note: Hook) -> Callable[..., Any]:
    """Tell our speculator which requests are new, and what the scheduler sends to it.

    ``note``: gets the model runner and the SchedulerOutput, when new requests have their rows.
    """

    def add_requests(self: Any, scheduler_output: Any) -> None:
        original(self, scheduler_output)
        note(self, scheduler_output)

    return add_requests


def _worker_batch(original: Callable[..., Any], note: Hook) -> Callable[..., Any]:
    """Tell our attention backend which requests are in the batch of a step.

    ``note``: gets the InputBatch of a step, which has the order of the requests, and its
    SchedulerOutput.
    """

    def prepare_inputs(
        self: Any,
        scheduler_output: Any,
        batch_req_state: Any,
        batch_desc: Any,
        num_active_loras: int,
    ) -> Any:
        batch = original(self, scheduler_output, batch_req_state, batch_desc, num_active_loras)
        note(batch, scheduler_output)
        return batch

    return prepare_inputs


def _worker_logits(original: Callable[..., Any], config_of: Hook) -> Callable[..., Any]:
    """Build all logits processors beside drafts from sessions, not only that of ``min_tokens``.

    ``config_of``: gets vLLM's configuration; returns the one to build the processors for.
    """

    def build_logitsprocs(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        return original(config_of(vllm_config), *args, **kwargs)

    return build_logitsprocs


def _worker_sampler(original: Callable[..., Any], drafted_only: Hook) -> Callable[..., Any]:
    """Sample a step that verifies no draft as vLLM does without speculation.

    ``drafted_only``: gets the SpecDecodeMetadata of a step, or None; returns it, or None if the
    step has no drafts.
    """

    def sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        return original(self, logits, drafted_only(spec_decode_metadata))

    return sample


PATCHES = (
    Patch(
        name="staged-ids",
        target="vllm.v1.worker.gpu.buffer_utils:StagedWriteTensor.stage_write",
        wrap=_staged_ids,
        calls=(Hook("vllm_stateful.adapters.worker.staged_ids:write_ids"),),
        symptom="A prompt of 100k tokens is pickled twice for every worker, unpickled twice and "
        "converted there: 12 ms, every turn (2 ms where the engine core holds the worker).",
        reason="The row that they end in is int32, but what is staged for it is a list.",
        feature="worker-ids",
        process="worker",
        signature="(self, index, start, x)",
        upstream="vllm-0.32/0009-worker-ids.patch",
        remove_when="vLLM sends prompts to its workers as arrays.",
    ),
    Patch(
        name="worker-speculator",
        target="vllm.v1.worker.gpu.model_runner:init_speculator",
        wrap=_worker_speculator,
        calls=(Hook("vllm_stateful.adapters.worker.lookup_speculator:make_speculator"),),
        symptom="ngram_gpu takes the longest match of at most prompt_lookup_max tokens, in the "
        "prompt alone, and nothing can take its place; custom_class falls back to model runner V1 "
        "without async scheduling.",
        reason="The method is chosen by an if-chain in the worker, without a registry.",
        feature="device-drafts",
        process="worker",
        signature="(vllm_config, device, req_states)",
        upstream="vllm-0.32/0015-device-drafts.patch",
        remove_when="custom_class works on model runner V2.",
    ),
    Patch(
        name="worker-requests",
        target="vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests",
        wrap=_worker_requests,
        calls=(Hook("vllm_stateful.adapters.worker.step_notes:note_step"),),
        symptom="A drafter on the device knows a request's own tokens, and nothing that its agent "
        "said in other requests. Where drafts are accepted past a stop, a recurrent state is "
        "behind tokens that were taken back: the next turn computes the answer again.",
        reason="propose() gets the batch, not the SchedulerOutput, and no other member of a "
        "speculator is called in a step. Nor is the rejection sampler told what ends an answer.",
        feature="device-drafts",
        process="worker",
        signature="(self, scheduler_output)",
        upstream="vllm-0.32/0015-device-drafts.patch",
        remove_when="a speculator sees the SchedulerOutput.",
    ),
    Patch(
        name="worker-batch",
        target="vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_inputs",
        wrap=_worker_batch,
        calls=(Hook("vllm_stateful.adapters.worker.batch_prefixes:note_batch"),),
        symptom="Eight sub-agents that share a prefix of 32k tokens read its keys eight times in "
        "each step: cascade attention wants a prefix that the whole batch shares.",
        reason="The scheduler knows who shares what; a metadata builder sees rows without their "
        "requests, and nothing of the SchedulerOutput. They are together only here.",
        feature="shared-prefixes",
        process="worker",
        signature="(self, scheduler_output, batch_req_state, batch_desc, num_active_loras)",
        upstream="vllm-0.32/0016-worker-batch.patch",
        remove_when="a metadata builder sees the SchedulerOutput and the order of its requests.",
    ),
    Patch(
        name="worker-logits",
        target="vllm.v1.worker.gpu_model_runner:build_logitsprocs",
        wrap=_worker_logits,
        calls=(Hook("vllm_stateful.adapters.speculation:without_speculation"),),
        symptom="With any --speculative-config, requests with min_p or logit_bias are refused, and "
        "custom logits processors do not start: model runner V1 builds none of them.",
        reason="V1 verifies no drafts under these processors. It does not have to where requests "
        "that use them are never given drafts, but it decides for all methods alike.",
        feature="engine-drafts",
        process="worker",
        signature="(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs=...)",
        upstream="vllm-0.32/0017-worker-logits.patch",
        remove_when="vLLM verifies drafts under min_p and logit_bias on model runner V1.",
    ),
    Patch(
        name="worker-sampler",
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample",
        wrap=_worker_sampler,
        calls=(Hook("vllm_stateful.adapters.speculation:drafted_only"),),
        symptom="With any --speculative-config, a request with logprob_token_ids (so each of "
        "/generative_scoring) ends the engine, and on a CPU one with top_k and without top_p.",
        reason="Model runner V1 sends each step through the rejection sampler, also one in which "
        "nothing was drafted. That sampler does not serve all that the ordinary one serves.",
        feature="engine-drafts",
        process="worker",
        signature="(self, logits, spec_decode_metadata)",
        upstream="vllm-0.32/0018-worker-sampler.patch",
        remove_when="model runner V1 samples steps without drafts with the ordinary sampler.",
    ),
)
