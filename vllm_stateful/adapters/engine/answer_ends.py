# SPDX-License-Identifier: Apache-2.0
"""Tells the workers the tokens behind which a state should be kept.

A step that accepts such a token samples nothing behind it. So the next step begins with it, and
`RunningStates` knows where the state behind it is. Nothing is lost: what would be sampled behind a
stop is thrown away in any case.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput

from vllm_stateful.adapters.slots import on_step


class AnswerEnds:
    """Sends the end tokens to one scheduler's workers, once.

    Args:
        ids: the token ids.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids = tuple(sorted(set(ids)))
        self._is_told = not self._ids

    def step_begins(self, output: SchedulerOutput) -> None:
        """Attach the ids to the first scheduled step that reaches the workers."""
        if not self._is_told and output.total_num_scheduled_tokens:
            on_step(output).ends = self._ids
            self._is_told = True


def end_ids(model_config: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer of this model, whichever client asks.

    A client's own ``stop_token_ids`` are not among them: they would cost other requests their
    drafts.

    Args:
        model_config: vLLM's.
        tokenizer: the model's; None where the engine core has none.
    """
    found: set[int] = set()
    said = model_config.try_get_generation_config().get("eos_token_id")
    of_model = getattr(model_config.hf_config, "eos_token_id", None)
    for ids in (said, of_model, getattr(tokenizer, "eos_token_id", None)):
        found.update([ids] if isinstance(ids, int) else ids or ())
    return found
