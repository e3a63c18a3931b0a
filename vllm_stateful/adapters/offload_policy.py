# SPDX-License-Identifier: Apache-2.0
"""A cache policy for vLLM's CPU offload tier that knows sessions.

vLLM loads it by its path, without a patch::

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
      "kv_connector_extra_config": {"cpu_bytes_to_use": 64000000000,
        "eviction_policy": "StatefulCachePolicy",
        "cache_policy_module_path": "vllm_stateful.adapters.offload_policy"}}'

A chunk is some blocks of KV on the host (vLLM's term); its key is their hash.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus, order_request_keys

from vllm_stateful.schedule.offload_order import OffloadOrder, Owner


class StatefulCachePolicy(CachePolicy):  # type: ignore[misc]
    """The chunks on the host. Those of the session that is least expected back go first.

    Args:
        cache_capacity: the number of chunks that the tier holds.
    """

    _newest: ClassVar[weakref.ref[StatefulCachePolicy] | None] = None

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self.order: OffloadOrder[OffloadKey] = OffloadOrder(cache_capacity, time.monotonic)
        self.owner_of: Callable[[str], Owner] = _request_itself
        """Tells the owner of a request by the request's id."""
        self._chunks: dict[OffloadKey, ChunkStatus] = {}
        self._evictable: set[OffloadKey] = set()
        StatefulCachePolicy._newest = weakref.ref(self)

    @classmethod
    def take_newest(cls) -> StatefulCachePolicy | None:
        """The policy that was made last, for the scheduler built with it. Returned only once.

        vLLM builds the connector, and with it the policy, inside its scheduler's constructor, and
        gives access to neither.
        """
        reference, cls._newest = cls._newest, None
        return None if reference is None else reference()

    # ---- what vLLM's CPUOffloadingManager asks ---------------------------------------------

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        """The chunk with this key; None when it is not here."""
        return self._chunks.get(key)

    def insert(self, key: OffloadKey, chunk: ChunkStatus, *_: ReqContext) -> None:
        """Add a chunk that a running request stores.

        Only vLLM 0.33 says which request that is; `on_request_finished` says it in 0.32, too.
        """
        self._chunks[key] = chunk
        self.order.stored(key)
        if chunk.ref_cnt == 0:
            self._evictable.add(key)

    def remove(self, key: OffloadKey) -> None:
        """Remove a chunk whose store failed."""
        del self._chunks[key]
        self._evictable.discard(key)
        self.order.removed(key)

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """Do nothing: which chunks a session used is known when its turn ends."""

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[OffloadKey]],
        insertion_only_keys: set[OffloadKey],
        reused_keys: set[OffloadKey],
        req_context: ReqContext,
    ) -> None:
        """Claim all chunks of the prompt, in order, for the session of the request."""
        keys = order_request_keys(key_groups, req_context)
        self.order.used(self.owner_of(req_context.req_id), keys)

    def evict(
        self, n: int, protected: set[OffloadKey]
    ) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        """Take out exactly ``n`` chunks that no transfer uses.

        Returns:
            The chunks; None, without any change, if there are fewer.
        """
        num_free = len(self._evictable) - len(self._evictable & protected)
        if n > num_free:
            return None
        taken = self.order.take(n, lambda key: key in self._evictable and key not in protected)
        self._evictable.difference_update(taken)
        return [(key, self._chunks.pop(key)) for key in taken]

    def clear(self) -> None:
        """Forget all chunks, as the tier was reset."""
        self._chunks.clear()
        self._evictable.clear()
        self.order.clear()

    def mark_evictable(self, key: OffloadKey) -> None:
        """Record that the last transfer of a chunk ended."""
        self._evictable.add(key)

    def mark_non_evictable(self, key: OffloadKey) -> None:
        """Record that a transfer of a chunk begins."""
        self._evictable.discard(key)


def _request_itself(request_id: str) -> Owner:
    """The owner of a request without a stateful scheduler: a session of its own."""
    return Owner(("request", request_id))
