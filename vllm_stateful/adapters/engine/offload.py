# SPDX-License-Identifier: Apache-2.0
"""Whether a scheduler has vLLM's offload tier. Without one nothing of it is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_stateful.adapters.fit import is_fit

if TYPE_CHECKING:
    from vllm_stateful.adapters.engine.offload_tier import OffloadTier

_CONNECTOR = (
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector",
    "OffloadingConnector",
)


def is_offloading(connector: Any) -> bool:
    """Whether a KV connector is vLLM's own offloading one, beside which sessions can be kept."""
    return (type(connector).__module__, type(connector).__qualname__) == _CONNECTOR


def tier_of(connector: Any) -> OffloadTier | None:
    """The tier of the connector that vLLM has just built; None where there is none of ours."""
    if connector is None or not is_offloading(connector):
        return None
    if not is_fit("offload", "engine"):
        return None
    from vllm_stateful.adapters.engine import offload_tier

    return offload_tier.tier_of(connector)
