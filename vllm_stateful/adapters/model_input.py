# SPDX-License-Identifier: Apache-2.0
"""What decides, beside its tokens, what the model computes for a request.

Everything that we keep under keys of our own (sessions, block hashes that a prompt inherits,
drafts, answers) takes this part of its key from here. It is read from vLLM. So a field that vLLM
adds to its block hashes, or to a LoRA request, becomes part of all our keys automatically.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

from vllm_stateful.types import Identity

HOW_IT_IS_LOADED = frozenset({"load_inplace"})
"""Fields of a LoRA request that do not say which adapter it is."""


def identity_of(request: Any) -> Identity:
    """The identity of a request whose prompt is text.

    Multimodal inputs and prompt embeddings are not part of it; they are handled elsewhere.

    Args:
        request: vLLM's ``EngineCoreRequest`` or ``Request``.
    """
    return Identity(request.cache_salt, adapter_of(request.lora_request), hash_keys(request))


def adapter_of(lora: Any | None) -> tuple[Hashable, ...] | None:
    """Everything that a LoRA request says about its adapter; None for the base model."""
    if lora is None:
        return None
    names = (name for name in lora.__struct_fields__ if name not in HOW_IT_IS_LOADED)
    return tuple(getattr(lora, name) for name in names)


def hash_keys(request: Any) -> tuple[Hashable, Hashable]:
    """What vLLM hashes beside the tokens: with a request's first block, and with a later block."""
    first, _ = generate_block_hash_extra_keys(_Text(request), 0, 1, 0)
    later, _ = generate_block_hash_extra_keys(_Text(request), 1, 2, 0)
    return first, later


class _Text:
    """A view of a request as if its prompt were only text."""

    mm_features = ()
    prompt_embeds = None

    def __init__(self, request: Any) -> None:
        self._request = request

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)
