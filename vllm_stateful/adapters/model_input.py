# SPDX-License-Identifier: Apache-2.0
"""What beside its tokens decides what the model computes for a request.

Whatever we keep under a key of our own (sessions, block hashes that a prompt inherits, drafts,
answers) takes this part of the key from here, and this takes it from vLLM: a field that vLLM adds
to its block hashes, or to a LoRA request, is part of every key of ours without further ado.
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

    Multimodal inputs and prompt embeddings stand in places of their own, and not in here.

    Args:
        request: vLLM's ``EngineCoreRequest`` or ``Request``.
    """
    return Identity(request.cache_salt, adapter_of(request.lora_request), hash_keys(request))


def adapter_of(lora: Any | None) -> tuple[Hashable, ...] | None:
    """All that a LoRA request says of its adapter; None for the base model."""
    if lora is None:
        return None
    names = (name for name in lora.__struct_fields__ if name not in HOW_IT_IS_LOADED)
    return tuple(getattr(lora, name) for name in names)


def hash_keys(request: Any) -> tuple[Hashable, Hashable]:
    """What vLLM hashes with a request's first block beside its tokens, and with a later one."""
    first, _ = generate_block_hash_extra_keys(_Text(request), 0, 1, 0)
    later, _ = generate_block_hash_extra_keys(_Text(request), 1, 2, 0)
    return first, later


class _Text:
    """A request as if its prompt were nothing but text."""

    mm_features = ()
    prompt_embeds = None

    def __init__(self, request: Any) -> None:
        self._request = request

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)
