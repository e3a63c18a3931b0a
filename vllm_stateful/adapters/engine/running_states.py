# SPDX-License-Identifier: Apache-2.0
"""Which tokens the recurrent states of a running request have read.

Without drafts the states have read all scheduled tokens. With drafts, a step writes one state for
each token that it verifies, into blocks side by side, and only the next step knows which of them
counts. The first state is always right: it has read the step's one token that is no draft. It lies
in the block of that token, column ``(position - 1) // block_size``. That is where the worker looks
for the state of a new request (``num_accepted`` is 1).

This relies on vLLM's layout of states (``vllm.v1.worker.mamba_utils``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.request import Request

from vllm_stateful.adapters.slots import of_request
from vllm_stateful.prefix.groups import Group


def is_only_step_in_flight(vllm_config: Any) -> bool:
    """Whether a step that begins where the last one ended is the only one in flight.

    This needs model runner V2, which keeps states itself. With pipeline parallelism more steps are
    in flight.
    """
    is_alone = vllm_config.parallel_config.pipeline_parallel_size == 1
    return bool(vllm_config.use_v2_model_runner and is_alone)


class RunningStates:
    """Knows the states of one scheduler's running requests.

    Args:
        groups: one group for each of vLLM's managers.
        num_drafts: the most drafted tokens of one request that a step verifies; 0 without drafts.
        is_step_known: whether a step in flight, if it is the only one, begins with the last token
            that is known. It does with model runner V2 without pipeline parallelism.
    """

    def __init__(
        self, groups: Sequence[Group], num_drafts: int = 0, *, is_step_known: bool = False
    ) -> None:
        self._sizes = [group.block_size for group in groups if group.is_state]
        self._num_drafts = num_drafts
        self._is_step_known = is_step_known
        self.are_any = bool(self._sizes)

    @property
    def are_known_in_answers(self) -> bool:
        """Whether the position is known at most steps of an answer."""
        return not (self.are_any and self._num_drafts) or self._is_step_known

    def position(self, request: Request) -> int | None:
        """The number of tokens that the states have read once all scheduled steps are computed.

        Returns:
            None where that is not known, or where the state at that position lies in another block
            than it would without drafts.
        """
        num_computed = int(request.num_computed_tokens)
        if not (self.are_any and self._num_drafts):
            return num_computed
        num_in_flight = int(request.num_output_placeholders)
        settled, seen = num_computed - num_in_flight, of_request(request)
        if seen.is_cut:  # the states have read tokens that a stop cut off
            return None
        if not num_in_flight:
            if seen.num_sampled > 1:  # drafts were right: the first state is an earlier one
                return None
            is_sure = not seen.num_sampled or self._is_inside(settled)
            return settled if is_sure else None
        if not self._is_step_known or seen.num_steps > 1:
            return None
        position = settled + 1
        has_no_drafts = num_in_flight == 1 and position <= request.num_prompt_tokens
        return position if has_no_drafts or self._is_inside(position) else None

    def _is_inside(self, position: int) -> bool:
        """Whether a step with all of its drafts ends before this position's block does.

        A step that goes beyond the block keeps its states one column further on. A step that
        accepts tokens up to the end of the block has its first state overwritten
        (``postprocess_mamba_fused_kernel``).
        """
        return all(
            (position - 1) // size == (position + self._num_drafts) // size for size in self._sizes
        )
