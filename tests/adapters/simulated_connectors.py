# SPDX-License-Identifier: Apache-2.0
"""The worker's side of KV connectors: of each kind that is simulated, and of several at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simulated_lmcache import SimulatedLMCache
from simulated_tier import SimulatedTier
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import (
    MultiConnector,
    MultiKVConnectorWorkerMetadata,
)
from vllm.v1.outputs import KVConnectorOutput


def several(*configs: KVTransferConfig) -> KVTransferConfig:
    """vLLM's configuration of a ``MultiConnector``."""
    children = [
        {
            "kv_connector": config.kv_connector,
            "kv_role": config.kv_role,
            "kv_connector_extra_config": config.kv_connector_extra_config,
        }
        for config in configs
    ]
    return KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"connectors": children},
    )


def connected(configs: Sequence[KVTransferConfig]) -> KVTransferConfig | None:
    """The configuration of none, one, or several."""
    return several(*configs) if len(configs) > 1 else configs[0] if configs else None


def worker_of(connector: Any, slots: list[list[int]], manager: Any) -> Any:
    """The worker's side of a connector that a scheduler has."""
    if isinstance(connector, MultiConnector):
        return SimulatedSeveral([worker_of(c, slots, manager) for c in connector.sub_connectors])
    engine = getattr(connector, "_lmcache_engine", None)
    return SimulatedTier(slots) if engine is None else SimulatedLMCache(slots, engine, manager)


class SimulatedSeveral:
    """As ``MultiConnector`` on the worker's side: each part has its own metadata."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    @property
    def lost(self) -> set[int]:
        return set().union(*(part.lost for part in self.parts))

    @property
    def num_loaded(self) -> int:
        return sum(part.num_loaded for part in self.parts)

    def begin(self, meta: Any) -> None:
        for part, own in zip(self.parts, meta.metadata, strict=True):
            part.begin(own)

    def end(self, meta: Any) -> KVConnectorOutput | None:
        outputs = [p.end(own) for p, own in zip(self.parts, meta.metadata, strict=True)]
        if not any(outputs):
            return None
        found = [output for output in outputs if output is not None]
        worker = tuple(None if o is None else o.kv_connector_worker_meta for o in outputs)
        return KVConnectorOutput(
            finished_recving=set().union(*(o.finished_recving or () for o in found)),
            invalid_block_ids=set().union(*(o.invalid_block_ids for o in found)),
            kv_connector_worker_meta=MultiKVConnectorWorkerMetadata(worker)
            if any(worker)
            else None,
        )
