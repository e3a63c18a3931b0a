# SPDX-License-Identifier: Apache-2.0
"""Model runner V2 samples nothing behind a token that ends an answer, in the step that samples it.

So such a token is the last of its step, and the recurrent state behind it is where the engine core
expects it (``adapters.engine.running_states``). All tokens keep their distribution, for what is cut
off is sampled anew in the next step.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_stateful.adapters.slots import of_step


def num_up_to_end(
    sampled: torch.Tensor, num_sampled: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """How many tokens each row keeps: up to its first end, that included.

    Args:
        sampled: token ids, shape ``[num_reqs, num_drafts + 1]``; arbitrary behind ``num_sampled``.
        num_sampled: shape ``[num_reqs]``.
        ends: token ids, shape ``[num_ends]``.

    Returns:
        Shape and type of ``num_sampled``.
    """
    places = torch.arange(sampled.shape[1], device=sampled.device)
    is_end = (sampled[:, :, None] == ends).any(2)
    kept = torch.where(is_end, places + 1, sampled.shape[1]).amin(1)
    return torch.minimum(num_sampled, kept.to(num_sampled.dtype))


class EndingRejectionSampler(RejectionSampler):  # type: ignore[misc]
    """vLLM's ``RejectionSampler``, which becomes one of these once ends are known."""

    ends: torch.Tensor
    """Token ids behind which a step samples nothing, shape ``[num_ends]``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, with what it sampled cut behind the first end."""
        output = super().__call__(*args, **kwargs)
        if output.sampling_mask_tensors is None:  # else there is one mask for each token
            kept = num_up_to_end(output.sampled_token_ids, output.num_sampled, self.ends)
            output.num_rejected = output.num_rejected + (output.num_sampled - kept)
            output.num_sampled = kept
        return output


def note_ends(runner: Any, scheduler_output: Any) -> None:
    """Part of the hook of ``worker-requests``: a step may bring the ids at which answers end."""
    ends, sampler = of_step(scheduler_output).ends, runner.rejection_sampler
    if not ends or type(sampler) is not RejectionSampler:
        return
    sampler.__class__ = EndingRejectionSampler
    sampler.ends = torch.tensor(ends, dtype=torch.int64, device=runner.device)
