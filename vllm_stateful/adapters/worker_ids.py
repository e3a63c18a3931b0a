# SPDX-License-Identifier: Apache-2.0
"""Scheduler to worker: a prompt's ids as one int32 array instead of a list of Python integers.

Model runner V1 copies them into a row of an int32 table: from a list that is a conversion of
every id, from an array a memory copy, and pickling an array costs next to nothing. Model runner
V2 extends Python lists with the ids (``StagedWriteTensor.stage_write``), where an array is slower
and, being tested for truth, an error: it keeps its lists. So does whatever else reads prompts:
KV connectors, logits processors of others, the thinking budget.
"""

from __future__ import annotations

from typing import Any

from vllm_stateful.adapters.turn import WORKER_ARRAY


def worker_ids(request: Any, is_v2: bool, uses_mrope: bool) -> Any:
    """Hook of ``worker-ids``: what the worker is told the prompt is.

    Args:
        request: vLLM's scheduler-side request.
        is_v2: whether the ids go to model runner V2.
        uses_mrope: whether the model computes positions from the list of ids.
    """
    array = getattr(request, WORKER_ARRAY, None)
    params = request.sampling_params
    if (
        array is None
        or is_v2
        or uses_mrope
        or params is None
        or params.prompt_logprobs is not None
        or params.thinking_token_budget is not None
        or len(array) != request.num_prompt_tokens
    ):
        return request.prompt_token_ids
    return array
