# SPDX-License-Identifier: Apache-2.0
"""Behind which token the recurrent states of a running request are.

Without drafts they are behind all that was scheduled. With drafts a step writes one state for each
token that it verifies, into blocks side by side, and only the next step knows which of them counts.
The first of these states is always right: it is behind the one token of the step that was no draft.
It stays where the last step put it, in the block that a request without drafts would have.

What is told here relies on vLLM's layout of states in ``vllm.v1.worker.mamba_utils``.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.request import Request

from vllm_stateful.adapters.slots import of_request
from vllm_stateful.prefix.groups import Group


class RunningStates:
    """The states of one scheduler's running requests.

    Args:
        groups: one for each of vLLM's managers.
        num_drafts: the most that a step verifies of one request; 0 without drafts.
        is_step_known: whether a step in flight begins behind the last token that is known. So it
            does where one step at most is in flight, and the worker keeps states itself.
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
        """Whether it can be told, more often than not, while an answer is generated."""
        return not (self.are_any and self._num_drafts) or self._is_step_known

    def position(self, request: Request) -> int | None:
        """How many tokens the states are behind, with all steps that were scheduled computed.

        Returns:
            None where that is not known, or where the blocks that vLLM's manager names do not hold
            these states.
        """
        num_computed = int(request.num_computed_tokens)
        if not (self.are_any and self._num_drafts):
            return num_computed
        num_in_flight = int(request.num_output_placeholders)
        settled, seen = num_computed - num_in_flight, of_request(request)
        if seen.is_cut:  # the states are behind tokens that a stop took back
            return None
        if not num_in_flight:
            if seen.num_sampled > 1:  # drafts were right: the first state is an earlier one
                return None
            is_sure = not seen.num_sampled or self._is_inside(settled)
            return settled if is_sure else None
        if not self._is_step_known:
            return None
        position = settled + 1
        has_no_drafts = num_in_flight == 1 and position <= request.num_prompt_tokens
        return position if has_no_drafts or self._is_inside(position) else None

    def _is_inside(self, position: int) -> bool:
        """Whether a step that ends here would end in this block with all of its drafts, too.

        Elsewhere the step writes its states one block further on, or vLLM moves them.
        """
        return all(
            (position - 1) // size == (position + self._num_drafts) // size for size in self._sizes
        )
