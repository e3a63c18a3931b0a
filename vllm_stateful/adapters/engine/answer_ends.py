# SPDX-License-Identifier: Apache-2.0
"""The tokens that a state should be kept behind, told to the workers.

A draft of such a token is not accepted: the model samples the token itself, and it is the last one
of its step. So the next step begins behind it, and `RunningStates` knows where its state is. What
would be accepted behind a stop is thrown away in any case.
"""

from __future__ import annotations

from collections.abc import Iterable

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_stateful.adapters.slots import on_step

MOST_ENDS = 256
"""Ids; those of further requests are left out, and their turns may be resumed further back."""


class AnswerEnds:
    """The ends that one scheduler knows of.

    Args:
        markers: ids with which segments of an answer begin.
    """

    def __init__(self, markers: Iterable[int]) -> None:
        self._ids = set(markers)
        self._are_new = bool(self._ids)

    def expect(self, request: Request) -> None:
        """A request came: what stops it counts from now on."""
        params = request.sampling_params
        if params is None:
            return
        new = params.all_stop_token_ids - self._ids
        if new and len(self._ids) + len(new) <= MOST_ENDS:
            self._ids |= new
            self._are_new = True

    def step_begins(self, output: SchedulerOutput) -> None:
        """A step was scheduled: its workers are told what they do not know yet."""
        if self._are_new and output.total_num_scheduled_tokens:
            on_step(output).ends = tuple(sorted(self._ids))
            self._are_new = False
