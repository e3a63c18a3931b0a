# SPDX-License-Identifier: Apache-2.0
"""How vLLM is told to take drafts from sessions, and what a request may say about them.

vLLM asks its worker for drafts after each step and hands them to the scheduler, which has the next
step verify them. Asked for by vLLM's own option, nothing is patched::

    --speculative-config '{"method": "custom_class", "num_speculative_tokens": 16,
      "model": "vllm_stateful.adapters.speculation.SessionDrafter"}'

the worker proposes nothing, and the scheduler puts the session's drafts in its place
(`scheduler_drafts`, imported only then: its index is compiled). Everything behind that is vLLM's:
grammars cut drafts, the rejection sampler keeps the distribution.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.request import Request

from vllm_stateful.config import parse_bool

XARG = "stateful_drafts"
"""``vllm_xargs`` of a request: 0 for no drafts; 1 for drafts that are worth it for this request
alone, whatever they cost the others."""


class SessionDrafter:
    """vLLM's ``custom_class`` proposer in the worker: it leaves drafting to the engine core."""

    def __init__(self, vllm_config: Any) -> None:
        pass

    def propose(self, sampled_token_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        """No drafts, one empty list for each request."""
        return [[] for _ in sampled_token_ids]

    def load_model(self, *_: Any, **__: Any) -> None:
        """There is none."""


NAME = f"{SessionDrafter.__module__}.{SessionDrafter.__qualname__}"


def is_asked_for(vllm_config: Any) -> bool:
    """Whether vLLM was told to take drafts from sessions."""
    config = vllm_config.speculative_config
    return config is not None and config.method == "custom_class" and config.model == NAME


def wish_of(request: Request) -> bool | None:
    """Whether a request asks for drafts or against them; what cannot be read asks for none."""
    value = (request.sampling_params.extra_args or {}).get(XARG)
    if value is None:
        return None
    try:
        return parse_bool(str(value))
    except ValueError:
        return False
