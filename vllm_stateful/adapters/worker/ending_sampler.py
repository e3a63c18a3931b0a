# SPDX-License-Identifier: Apache-2.0
"""Makes model runner V2 stop a step's sampling at the first token that ends an answer.

Such a token is then the last of its step, so the recurrent state behind it is where the engine core
expects it (``adapters.engine.running_states``). All tokens keep their distribution, because the
tokens that are cut off are sampled anew in the next step.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_stateful.adapters.slots import of_step


def num_up_to_end(
    sampled: torch.Tensor, num_sampled: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """The number of tokens that each row keeps: up to and including its first end.

    Args:
        sampled: token ids, shape ``[num_reqs, num_drafts + 1]``; arbitrary behind ``num_sampled``.
        num_sampled: the number of sampled tokens, shape ``[num_reqs]``.
        ends: the token ids that end an answer, shape ``[num_ends]``.

    Returns:
        The numbers, with the shape and type of ``num_sampled``.
    """
    places = torch.arange(sampled.shape[1], device=sampled.device)
    is_end = (sampled[:, :, None] == ends).any(2)
    kept = torch.where(is_end, places + 1, sampled.shape[1]).amin(1)
    return torch.minimum(num_sampled, kept.to(num_sampled.dtype))


class EndingRejectionSampler(RejectionSampler):  # type: ignore[misc]
    """vLLM's ``RejectionSampler``. The runner's one gets this class when the ends are known."""

    ends: torch.Tensor
    """Token ids behind which a step samples nothing, shape ``[num_ends]``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample as vLLM does, then cut off what is behind the first end."""
        output = super().__call__(*args, **kwargs)
        if output.sampling_mask_tensors is None:  # otherwise there is a mask for each token
            kept = num_up_to_end(output.sampled_token_ids, output.num_sampled, self.ends)
            output.num_rejected = output.num_rejected + (output.num_sampled - kept)
            output.num_sampled = kept
        return output


def note_ends(runner: Any, scheduler_output: Any) -> None:
    """Part of the hook of ``worker-requests``: take the ids that end answers from a step."""
    ends, sampler = of_step(scheduler_output).ends, runner.rejection_sampler
    if not ends or type(sampler) is not RejectionSampler:
        return
    sampler.__class__ = EndingRejectionSampler
    sampler.ends = torch.tensor(ends, dtype=torch.int64, device=runner.device)
