# SPDX-License-Identifier: Apache-2.0
"""Scheduler to worker: sends a prompt's ids as one int32 array, not a list of Python integers.

Model runner V1 copies the ids into a row of an int32 table. From a list, that converts every id;
from an array, it is a memory copy. Pickling an array costs next to nothing. Model runner V2 extends
Python lists with the ids (``StagedWriteTensor.stage_write``). It gets them twice: as the prompt,
and as all that is to be computed. `adapters.worker.staged_ids` makes it take an array. The list is
sent where other code reads prompts: KV connectors, logits processors of others, the thinking
budget.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_stateful.adapters.slots import of_request
from vllm_stateful.types import token_array


def worker_ids(request: Any, all_ids: Any, uses_mrope: bool) -> tuple[Any, Any]:
    """Hook of ``worker-ids``: the prompt's ids, in the form in which the worker gets them.

    Args:
        request: vLLM's scheduler-side request.
        all_ids: the ids of the prompt and the answer so far for model runner V2; else None.
        uses_mrope: whether the model computes positions from the list of ids.

    Returns:
        The ids of the prompt, and all ids.
    """
    found = of_request(request)
    array = found.prompt if found.is_array_sent else None
    params = request.sampling_params
    if (
        array is None
        or uses_mrope
        or params is None
        or params.prompt_logprobs is not None
        or params.thinking_token_budget is not None
        or len(array) != request.num_prompt_tokens
    ):
        return request.prompt_token_ids, all_ids
    if all_ids is None:
        return array, None
    answer = list(request.output_token_ids)  # of a request that was preempted
    return array, np.concatenate([array, token_array(answer)]) if answer else array
