# SPDX-License-Identifier: Apache-2.0
"""Chooses on the device between a drafting head's draft and one looked up in the session's text.

The head drafts as without us, with its CUDA graphs. Our kernels look up a second draft, and for
each request one of the two is verified (`speculate/beside_head.py` says how the choice is learned).
A draft that was looked up consists of tokens, not of distributions, like that of a head without
logits. So this works only for heads that draft greedily, which is vLLM's default.

Source: vLLM ``v1/worker/gpu/spec_decode/speculator.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor

from vllm_stateful.adapters.worker import lookup_kernels
from vllm_stateful.adapters.worker.lookup_speculator import ACCEPTED, SURE, LookupSpeculator
from vllm_stateful.speculate.answer_buffer import MAX_MATCH
from vllm_stateful.speculate.beside_head import HEAD_CHANCE, PRIOR_DRAFTS

FORGET_STEPS = 512
"""Steps after which everything learned about both drafts counts half."""


class LookupBesideHead(LookupSpeculator):
    """Looks up drafts, and chooses between them and those of a head.

    Args:
        vllm_config: vLLM's configuration.
        device: the device of the model.
        req_states: the runner's table of requests.
        head: vLLM's speculator. Its ``propose`` is replaced by `propose_beside`, which calls it.
    """

    def __init__(self, vllm_config: Any, device: torch.device, req_states: Any, head: Any) -> None:
        super().__init__(vllm_config, device, req_states)
        # With a head, vLLM keeps the texts in host memory. Our kernels read them in each step.
        size = (req_states.max_num_reqs, req_states.max_model_len)
        req_states.all_token_ids = StagedWriteTensor(size, torch.int32, device)
        self.is_on = False
        """Whether the engine core keeps sessions, as it says with the first requests."""
        num_reqs, num_drafts = req_states.max_num_reqs, self.num_speculative_steps
        self.both = torch.zeros(num_reqs, 2, num_drafts, dtype=torch.int32, device=device)
        self.chosen = torch.zeros(num_reqs, num_drafts, dtype=torch.int64, device=device)
        self.taken = torch.zeros(num_reqs, dtype=torch.int32, device=device)
        self.margins = prior_margins(num_drafts).to(device)
        self._head = head
        self._propose = head.propose
        self._observe = getattr(head, "observe_verification", None)
        head.propose = self.propose_beside
        if self._observe is not None:
            head.observe_verification = self.observe_verification

    @torch.inference_mode()
    def propose_beside(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: Any,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        *more: Any,
        **named: Any,
    ) -> torch.Tensor:
        """Propose the drafts for a step. This replaces the head's ``propose``.

        Returns:
            int64, shape ``[num_reqs, num_speculative_tokens]``, in the order of the batch.
        """
        given = (input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states)
        verdicts = (num_sampled, num_rejected, last_sampled)
        drafts: torch.Tensor = self._propose(*given, *verdicts, *more, **named)
        if named.get("dummy_run") or not self.is_on:
            return drafts
        num_reqs, states = input_batch.num_reqs, input_batch.idx_mapping
        num_drafts = named.get("num_speculative_tokens")
        num_drafts = self.num_speculative_steps if num_drafts is None else num_drafts
        self._weigh(num_reqs, states, num_sampled)
        if num_drafts == 0:  # vLLM drafts nothing for a large batch
            self.table[states.long(), 2:] = 0
            return drafts
        self.propose(*given, *verdicts)
        return self._choose(num_reqs, states, drafts, num_drafts)

    def observe_verification(
        self, idx_mapping: torch.Tensor, num_sampled: torch.Tensor, num_rejected: torch.Tensor
    ) -> None:
        """Call vLLM's, counting only requests for which the head's draft was verified."""
        assert self._observe is not None
        if self._head.acceptance_estimator is not None:
            is_head = self.taken[idx_mapping.long()] == 0
            num_sampled, num_rejected = num_sampled * is_head, num_rejected * is_head
        self._observe(idx_mapping, num_sampled, num_rejected)

    def _weigh(self, num_reqs: int, states: torch.Tensor, num_sampled: torch.Tensor) -> None:
        if self._num_steps % FORGET_STEPS == FORGET_STEPS - 1:
            self.margins.copy_(torch.div(self.margins, 2, rounding_mode="trunc"))
        tokens = self.req_states.all_token_ids.gpu
        lookup_kernels.weigh_kernel[(num_reqs,)](
            tokens,
            tokens.stride(0),
            states,
            self.req_states.total_len.gpu,
            num_sampled,
            self.table,
            self.both,
            self.margins,
            **self._sizes,
        )

    def _choose(
        self, num_reqs: int, states: torch.Tensor, drafts: torch.Tensor, num_drafts: int
    ) -> torch.Tensor:
        lookup_kernels.choose_kernel[(num_reqs,)](
            states,
            self.table,
            self.both,
            self.margins,
            self.drafts,
            self.draft_token_confidence_probs,
            drafts,
            drafts.stride(0),
            self.chosen,
            self._head.draft_token_confidence_probs,
            self.taken,
            num_drafts,
            **self._sizes,
        )
        return self.chosen[:num_reqs]


def prior_margins(num_drafts: int) -> torch.Tensor:
    """By how many tokens a looked-up draft is assumed to be better than a head's.

    Returns:
        The sum over ``PRIOR_DRAFTS`` drafts, by the length of the match: int32, shape
        ``[MAX_MATCH + 1]``. Whole numbers make all ranks of a tensor-parallel group get equal sums.
    """
    chances = np.array([0.0, *ACCEPTED] + [SURE] * (MAX_MATCH + num_drafts))
    found = [chances[match : match + num_drafts].cumprod().sum() for match in range(MAX_MATCH + 1)]
    head = (HEAD_CHANCE ** np.arange(1, num_drafts + 1)).sum()
    margins = np.round((np.array(found) - head) * PRIOR_DRAFTS).astype(np.int32)
    return torch.from_numpy(margins)
