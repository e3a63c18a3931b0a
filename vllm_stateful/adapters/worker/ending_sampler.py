# SPDX-License-Identifier: Apache-2.0
"""Model runner V2 accepts no draft of a token that ends an answer: the model samples it itself.

So such a token is the last of its step, and the recurrent state behind it is where the engine core
expects it (``adapters.engine.running_states``). What is sampled has the same distribution: a draft
that is not valid is verified by nothing, and the token is drawn from the model's.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_stateful.adapters.slots import of_step


class EndingRejectionSampler(RejectionSampler):  # type: ignore[misc]
    """vLLM's ``RejectionSampler``, which becomes one of these once ends are known."""

    ends: torch.Tensor
    """Ids of which no draft is accepted, shape ``[num_ends]``."""

    def __call__(
        self,
        logits: torch.Tensor,
        input_batch: Any,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,
    ) -> Any:
        """vLLM's, with more drafts that are not valid.

        Args:
            logits: shape ``[num_logits, vocab_size]``.
            input_batch: vLLM's ``InputBatch``.
            draft_logits: as vLLM has them.
            invalid_drafts: rows of ``logits`` whose draft must not be accepted, shape
                ``[num_logits]``.
        """
        drafts = input_batch.input_ids[input_batch.logits_indices]
        is_end = torch.isin(drafts, self.ends) & (input_batch.expanded_local_pos > 0)
        if invalid_drafts is not None:
            is_end |= invalid_drafts
        return super().__call__(logits, input_batch, draft_logits, is_end)


def note_ends(runner: Any, scheduler_output: Any) -> None:
    """Part of the hook of ``worker-requests``: a step may bring ids at which answers end."""
    ends, sampler = of_step(scheduler_output).ends, runner.rejection_sampler
    if not ends or not isinstance(sampler, RejectionSampler):
        return
    ids = torch.tensor(ends, dtype=torch.int32, device=runner.device)
    if type(sampler) is RejectionSampler:
        sampler.__class__ = EndingRejectionSampler
    if isinstance(sampler, EndingRejectionSampler):
        sampler.ends = ids
