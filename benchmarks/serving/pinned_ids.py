# SPDX-License-Identifier: Apache-2.0
"""Makes the model write given token ids: a logits processor that vLLM loads by its name.

    vllm serve ... --logits-processors benchmarks.serving.pinned_ids:PinnedIds

A request says them in its body, the end of the answer too: `"vllm_xargs": {"pinned_ids": [...]}`.
The model does all of its work, and then no choice is left to it. Pinning the text with a grammar
instead leaves the choice of the tokens, and SmolLM2 cuts most recorded answers into other tokens
than its tokenizer does: no model does so in its own text.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FIELD = "pinned_ids"


class PinnedIds(AdapterLogitsProcessor):  # type: ignore[misc]
    """Leaves only the next pinned id; other requests are not touched."""

    def is_argmax_invariant(self) -> bool:
        """It decides what is sampled, at temperature 0 too."""
        return False

    def new_req_logits_processor(
        self, params: Any
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        """The processor of one request; None when nothing is pinned."""
        pinned = (params.extra_args or {}).get(FIELD)
        if not pinned:
            return None

        def pin(made: list[int], logits: torch.Tensor) -> torch.Tensor:
            if len(made) < len(pinned):
                wanted = pinned[len(made)]
                logits.fill_(float("-inf"))
                logits[wanted] = 0.0
            return logits

        return pin
