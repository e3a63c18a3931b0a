# SPDX-License-Identifier: Apache-2.0
"""Makes the model write given token ids, drafts or not: an extension that vLLM's worker loads.

    vllm serve ... --worker-extension-cls benchmarks.serving.pinned_ids.PinnedIds

A request says them in its body, the end of the answer too: `"vllm_xargs": {"pinned_ids": [...]}`.
The model does all of its work, and then every row of logits has one token left: the one that stands
at its place. So a drafted token is accepted where it is what was recorded, and a wrong one costs
its row. A grammar, the other way to pin a text, cuts wrong drafts before they cost anything, and
SmolLM2 cuts most recorded answers into other tokens than its tokenizer does: no model does so in
its own text. A logits processor would do for servers without drafts; with them vLLM allows none.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

FIELD = "pinned_ids"


class PinnedIds:
    """Adds nothing to the worker: importing this module is what pins (model runner V1)."""


def pin(runner: Any, logits: torch.Tensor, metadata: Any | None) -> None:
    """Leave one token in each row of the requests that are pinned, in place.

    Args:
        logits: shape ``[num_rows, vocab_size]``: for each request in the order of the batch a row
            for each drafted token and one more.
        metadata: of the drafts in the step; None when there is none.
    """
    row = 0
    for place, name in enumerate(runner.input_batch.req_ids):
        num_rows = 1 if metadata is None else metadata.num_draft_tokens[place] + 1
        request = runner.requests[name]
        pinned = (request.sampling_params.extra_args or {}).get(FIELD)
        if pinned:
            num_made = len(request.output_token_ids)
            for each, token in enumerate(pinned[num_made : num_made + num_rows]):
                logits[row + each].fill_(float("-inf"))
                logits[row + each, token] = 0.0
        row += num_rows


def _pinning(sample: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(sample)
    def _sample(self: Any, logits: torch.Tensor, spec_decode_metadata: Any | None) -> Any:
        pin(self, logits, spec_decode_metadata)
        return sample(self, logits, spec_decode_metadata)

    return _sample


GPUModelRunner._sample = _pinning(GPUModelRunner._sample)
