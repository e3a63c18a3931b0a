# SPDX-License-Identifier: Apache-2.0
"""Computes block hashes again from tokens and identity, as part of the invariant check."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    make_block_hash_with_group_id,
)
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.request import Request

from vllm_stateful.errors import InvariantError


class HashCheck:
    """Checks the hashes of one scheduler's requests. Each block is hashed again once.

    Args:
        hash_block_size: the number of tokens that one hash stands for.
        algorithm: vLLM's name of the hash function.
        num_ahead: the number of tokens behind a block that its hash covers, too. 0 with vLLM 0.32.
    """

    def __init__(self, hash_block_size: int, algorithm: str, num_ahead: int = 0) -> None:
        self._num_ahead = num_ahead
        ahead = (num_ahead,) if num_ahead else ()
        self._hasher: Callable[[Any], list[Any]] = get_request_block_hasher(
            hash_block_size, get_hash_fn_by_name(algorithm), *ahead
        )
        self._right: dict[str, list[Any]] = {}
        """The hashes that were found right, by running request."""

    def check(self, manager: Any, requests: dict[str, Request]) -> None:
        """Check the hashes that are new since the last call, and the blocks that bear them.

        Raises:
            InvariantError: a hash does not follow from the block's tokens and identity.
        """
        for gone in self._right.keys() - requests.keys():
            del self._right[gone]
        for name, request in requests.items():
            if request.block_hashes:
                self._check_request(request, self._right.setdefault(name, []))
                self._check_blocks(manager, request)

    def _check_request(self, request: Request, right: list[Any]) -> None:
        found = request.block_hashes
        if len(right) < len(found):
            right += self._hash(request, right)
        if found != right[: len(found)]:  # perhaps its tokens were replaced (streamed input)
            right[:] = self._hash(request, [])
        for place, (one, expected) in enumerate(zip(found, right, strict=False)):
            if one != expected:
                raise InvariantError(
                    f"request {request.request_id}: the hash of its block {place} is not that of "
                    "its tokens and identity"
                )

    def _hash(self, request: Request, known: list[Any]) -> list[Any]:
        """The hashes of the blocks behind those whose hashes are known."""
        return self._hasher(
            SimpleNamespace(
                block_hashes=list(known),
                num_tokens=request.num_tokens,
                all_token_ids=request.all_token_ids,
                lora_request=request.lora_request,
                cache_salt=request.cache_salt,
                mm_features=request.mm_features,
                prompt_embeds=request.prompt_embeds,
                _prompt_embeds_per_block_hashes={},
            )
        )

    def _check_blocks(self, manager: Any, request: Request) -> None:
        """Check the hash that each of a request's blocks bears, where a block is as long as a hash.

        The expected hash is found by the number of tokens that vLLM notes at the block. Nothing is
        checked where a turn may continue a block whose next token was another one (states beside a
        draft head): the block's hash covers that token, too.
        """
        if self._num_ahead > manager.lookahead:
            return
        size = manager.block_pool.hash_block_size
        for number, group in enumerate(manager.coordinator.single_type_managers):
            if group.block_size != size:
                continue
            for place, block in enumerate(group.req_to_blocks.get(request.request_id, ())):
                found, num_tokens = block.block_hash, block.block_hash_num_tokens
                if found is None or not num_tokens or num_tokens % size:
                    continue
                ends_at = num_tokens // size
                if ends_at > len(request.block_hashes):
                    continue
                expected = request.block_hashes[ends_at - 1]
                is_elsewhere = ends_at != place + 1 and not isinstance(group, MambaManager)
                if is_elsewhere or found != make_block_hash_with_group_id(expected, number):
                    raise InvariantError(
                        f"block {block.block_id}, at place {place} of request "
                        f"{request.request_id}, bears the hash of something else"
                    )
