# SPDX-License-Identifier: Apache-2.0
"""Looks up drafts on the device, for model runner V2, instead of vLLM's ``ngram_gpu``.

Nothing waits for the host, so async scheduling and full CUDA graphs stay in use. The earlier
answers of the same agent come from the engine core (`device_drafts`): a few hundred tokens when
a turn ends. With ``enable_adaptive_verification``, vLLM verifies only drafts whose chance is worth
their cost. It measures these costs when it starts.

Source: vLLM ``v1/worker/gpu/spec_decode/ngram/speculator.py`` and ``adaptive_verification.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.triton_utils import triton
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_stateful.adapters.slots import of_step
from vllm_stateful.adapters.speculation import has_head, is_looked_up, why_not_beside_head
from vllm_stateful.adapters.worker import lookup_kernels
from vllm_stateful.adapters.worker.lookup_kernels import BLOCK, MAX_PLACES, NUM_COLUMNS
from vllm_stateful.config import process_config
from vllm_stateful.speculate.answer_buffer import (
    BUFFER_TOKENS,
    END,
    MAX_MATCH,
    REGION_TOKENS,
    LookupUpdate,
)

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.states import RequestState

logger = init_logger("vllm.stateful")

ACCEPTED = (0.24, 0.45, 0.59, 0.71, 0.74, 0.76, 0.80, 0.83, 0.83, 0.83, 0.84, 0.86, 0.88, 0.90)
"""How often a token behind a match of 1, 2, ... tokens was right in recorded agent text
(``benchmarks/details/drafts.md``, on CUDA). For longer matches it is `SURE`."""

SURE = 0.94
PRIOR_TOKENS = 32.0
"""The number of verified tokens that these shares count as, for each length of the match."""

MEMBER = "stateful_beside"
"""The attribute of a head's speculator that holds the `LookupBesideHead` beside it."""

FORGET_STEPS = 4096
"""Steps after which everything learned counts half."""


class LookupSpeculator(BaseSpeculator):  # type: ignore[misc]
    """Like ``ngram_gpu``, but with the longest match, also in earlier answers of the same agent.

    Args:
        vllm_config: vLLM's configuration. ``num_speculative_tokens`` are drafted for each request.
        device: the device of the model.
        req_states: the runner's table of requests, with all their tokens.
    """

    supports_mm_inputs = False
    draft_logits = None

    def __init__(self, vllm_config: Any, device: torch.device, req_states: RequestState) -> None:
        config = vllm_config.speculative_config
        self.req_states = req_states
        self.device = device
        self.num_speculative_steps: int = config.num_speculative_tokens
        self.enable_adaptive_verification: bool = config.enable_adaptive_verification
        num_reqs, num_drafts = req_states.max_num_reqs, self.num_speculative_steps
        self.num_own = triton.cdiv(req_states.max_model_len, BLOCK)
        self.num_columns = self.num_own + triton.cdiv(REGION_TOKENS, BLOCK)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.answers = zeros(BUFFER_TOKENS).fill_(END)
        self.table = zeros(num_reqs, NUM_COLUMNS)
        self.best = zeros(num_reqs, self.num_columns)
        self.drafts = zeros(num_reqs, num_drafts, dtype=torch.int64)
        self.draft_token_confidence_probs = zeros(num_reqs, num_drafts, dtype=torch.float32)
        self.counts = prior().to(device)
        self._sizes = {"K": num_drafts, "K_BLOCK": triton.next_power_of_2(num_drafts)}
        self._num_steps = 0

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Do nothing: our kernels are not captured."""

    def capture(self) -> None:
        """Do nothing: our kernels are not captured."""

    def begin(self, names: list[str], update: LookupUpdate | None) -> None:
        """Take new requests, and what the engine core says about where requests may look.

        Args:
            names: the ids of the requests that were added.
            update: what the engine core sent; None if nothing is new.
        """
        spans = {} if update is None else update.spans
        for start, tokens in () if update is None else update.writes:
            async_tensor_h2d(tokens, out=self.answers[start : start + len(tokens)])
        rows = self.req_states.req_id_to_index
        added = np.array([(rows[name], *spans.get(name, (0, 0)), 0, 0) for name in names])
        moved = [name for name in spans if name in rows and name not in names]
        changed = np.array([(rows[name], *spans[name]) for name in moved])
        for lines in (added, changed):
            if len(lines):
                sent = async_tensor_h2d(lines.astype(np.int32), device=self.device)
                self.table[sent[:, 0].long(), : lines.shape[1] - 1] = sent[:, 1:]

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        *_: Any,
        dummy_run: bool = False,
        **__: Any,
    ) -> torch.Tensor:
        """Propose drafts for the requests of a step.

        Returns:
            int64, shape ``[num_reqs, num_speculative_tokens]``, in the order of the batch.
        """
        num_reqs = input_batch.num_reqs
        if not dummy_run:
            states = input_batch.idx_mapping
            self._learn(num_reqs, states, num_sampled, num_rejected)
            self._find(num_reqs, states, num_sampled, is_own=True)
            self._find(num_reqs, states, num_sampled, is_own=False)
            self._draft(num_reqs, states, last_sampled)
        return self.drafts[:num_reqs]

    def _learn(self, num_reqs: int, states: torch.Tensor, *verdicts: torch.Tensor) -> None:
        self._num_steps += 1
        if self._num_steps % FORGET_STEPS == 0:
            self.counts.mul_(0.5)
        lookup_kernels.learn_kernel[(num_reqs,)](
            states, *verdicts, self.table, self.counts, **self._sizes, MAX_MATCH=MAX_MATCH
        )

    def _find(
        self, num_reqs: int, states: torch.Tensor, num_sampled: torch.Tensor, *, is_own: bool
    ) -> None:
        num_blocks = self.num_own if is_own else self.num_columns - self.num_own
        tokens = self.req_states.all_token_ids.gpu
        lookup_kernels.find_kernel[(num_reqs, num_blocks)](
            tokens,
            tokens.stride(0),
            states,
            self.req_states.total_len.gpu,
            num_sampled,
            self.answers,
            self.table,
            self.best,
            self.best.stride(0),
            0 if is_own else self.num_own,
            OWN=is_own,
            MAX_MATCH=MAX_MATCH,
            BLOCK=BLOCK,
        )

    def _draft(self, num_reqs: int, states: torch.Tensor, last_sampled: torch.Tensor) -> None:
        tokens = self.req_states.all_token_ids.gpu
        lookup_kernels.draft_kernel[(num_reqs,)](
            tokens,
            tokens.stride(0),
            states,
            self.req_states.total_len.gpu,
            last_sampled.view(-1),
            self.answers,
            self.table,
            self.best,
            self.best.stride(0),
            self.num_own,
            self.num_columns,
            self.counts,
            self.drafts,
            self.draft_token_confidence_probs,
            **self._sizes,
            COLUMNS_BLOCK=triton.next_power_of_2(self.num_columns),
            MAX_MATCH=MAX_MATCH,
        )


def prior() -> torch.Tensor:
    """The assumed counts of drafted and accepted tokens, by the length of the match.

    Returns:
        float32, shape ``[2, MAX_MATCH + 1]``.
    """
    tried = torch.full((MAX_MATCH + 1,), PRIOR_TOKENS)
    sure = [SURE] * (MAX_MATCH - len(ACCEPTED))
    return torch.stack([tried, tried * torch.tensor([0.0, *ACCEPTED, *sure])])


def make_speculator(
    stock: Callable[..., Any], vllm_config: Any, device: Any, req_states: Any
) -> Any:
    """Hook of ``worker-speculator``: ours for ``ngram_gpu`` or beside a head, else vLLM's."""
    is_beside_head = has_head(vllm_config) and not why_not_beside_head(
        vllm_config, process_config()
    )
    if not is_beside_head and not is_looked_up(vllm_config):
        return stock(vllm_config, device, req_states)
    if req_states.max_model_len > MAX_PLACES:
        logger.warning("stateful: drafts are left to vLLM: texts of more than %d", MAX_PLACES)
        return stock(vllm_config, device, req_states)
    if is_looked_up(vllm_config):
        return LookupSpeculator(vllm_config, device, req_states)
    from vllm_stateful.adapters.worker.lookup_beside import LookupBesideHead

    head = stock(vllm_config, device, req_states)
    setattr(head, MEMBER, LookupBesideHead(vllm_config, device, req_states, head))
    return head


def note_requests(runner: Any, scheduler_output: Any) -> None:
    """Pass what a step brings to our speculator, when its new requests have rows."""
    found = runner.speculator
    lookup = found if isinstance(found, LookupSpeculator) else getattr(found, MEMBER, None)
    step = of_step(scheduler_output)
    update = step.lookup
    names = [new.req_id for new in scheduler_output.scheduled_new_reqs]
    if lookup is None:
        return
    if step.is_beside_head and lookup is not found:
        lookup.is_on = True
    if names or update is not None:
        lookup.begin(names, update)
