# SPDX-License-Identifier: Apache-2.0
"""Says beside which of vLLM's KV connectors sessions are kept, and why not beside others.

KV that sessions keep is safe beside a connector that does the following:

1. It loads only into blocks that vLLM allocated for that request behind its local hit. It loads
   only the tokens that it announced (``get_num_new_matched_tokens``), in whole units that begin at
   a unit's boundary (`loads`).
2. It reads a request's blocks only until they are freed: in its steps, or, where
   ``request_finished`` returns True, until it reports that the request was sent.
3. It takes no references on blocks, and hands none to anybody else.
4. It reports a failed load at the latest with the step that would have read the loaded KV.

vLLM's scheduler then does the rest, whichever connector it is. The code of each class named here
was read for this. Every other class is not known, not even a subclass of a named one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from vllm_stateful.adapters.engine.loads import Loads
from vllm_stateful.adapters.fit import is_fit
from vllm_stateful.prefix.groups import Group

if TYPE_CHECKING:
    from vllm_stateful.adapters.engine.offload_tier import OffloadTier

_V1 = "vllm.distributed.kv_transfer.kv_connector.v1."

WHOLE = sys.maxsize
"""The unit of a connector that loads a prompt from its first token on, even if a part of it is
here."""

OFFLOADING = (_V1 + "offloading_connector", "OffloadingConnector")
MULTI = (_V1 + "multi_connector", "MultiConnector")


def _exact(connector: Any) -> int:
    """The connector loads from any block boundary that it is told."""
    return 1


def _lmcache_chunk(connector: Any) -> int:
    """LMCache in the engine's process loads whole chunks, even if vLLM has the beginning of one."""
    engine = getattr(connector, "_lmcache_engine", None)
    return getattr(engine, "_lmcache_chunk_size", None) or WHOLE


UNITS: dict[tuple[str, str], Callable[[Any], int]] = {
    OFFLOADING: _exact,
    (_V1 + "lmcache_connector", "LMCacheConnectorV1"): _lmcache_chunk,
    ("lmcache.integration.vllm.lmcache_connector_v1", "LMCacheConnectorV1Dynamic"): _lmcache_chunk,
}
"""The unit of each class: its loads begin at multiples of so many tokens."""

_TRANSFERS = ("nixl", "mooncake", "moriio", "hisparse", "p2p", "decode_bench_connector")
"""Modules of connectors that move KV from engines that prefill to engines that decode."""


def _name(connector: Any) -> tuple[str, str]:
    return type(connector).__module__, type(connector).__qualname__


def parts_of(connector: Any) -> Iterator[Any]:
    """The connectors that do the work: those inside a ``MultiConnector``, or itself."""
    if _name(connector) == MULTI:
        for part in connector.sub_connectors:
            yield from parts_of(part)
    else:
        yield connector


def unsupported_connector(scheduler: Any, groups: list[Group]) -> str | None:
    """Why sessions cannot be kept beside an engine's connector; None when they can."""
    connector = scheduler.connector
    if connector is None:
        return None
    for part in (connector, *parts_of(connector)):
        reason = _unsupported(part)
        if reason is not None:
            return reason
    if all(_name(part) == OFFLOADING for part in parts_of(connector)):
        return None
    if not all(group.is_full for group in groups):
        return f"{_name(connector)[1]} beside windows or states"
    if scheduler.use_eagle or scheduler.num_prefill_lookahead:
        return f"{_name(connector)[1]} beside a draft head"
    return None


def _unsupported(connector: Any) -> str | None:
    name = _name(connector)
    role = connector._kv_transfer_config.kv_role
    said = f"{name[1]} as {role}"
    if name[0].removeprefix(_V1).startswith(_TRANSFERS) and name[0].startswith(_V1):
        return f"{said}: P/D transfer, blocks belong to another engine after a request's end"
    if name[0].endswith("lmcache_mp_connector"):
        return f"{said}: LMCache as a server was not run beside sessions yet"
    if name != MULTI and name not in UNITS:
        return f"{said}: a KV connector that is not known"
    if name == OFFLOADING:
        return None
    if role != "kv_both":
        return f"{said}: P/D transfer was not tried beside sessions, kv_both was"
    if getattr(_lmcache_config(connector), "enable_blending", False):
        return f"{said}: blended KV is not that of the tokens before it"
    return None


def _lmcache_config(connector: Any) -> Any:
    return getattr(getattr(connector, "_lmcache_engine", None), "config", None)


def loads_of(connector: Any, block_size: int) -> Loads | None:
    """The loads of a supported connector; None without a connector."""
    if connector is None:
        return None
    parts = [(part, UNITS[_name(part)](part)) for part in parts_of(connector)]
    return Loads(connector, parts, block_size)


def tier_of(connector: Any) -> OffloadTier | None:
    """vLLM's offload tier in a connector that was just built; None when it keeps vLLM's order."""
    tiers = [] if connector is None else [p for p in parts_of(connector) if _name(p) == OFFLOADING]
    if not tiers or not is_fit("offload", "engine"):
        return None
    from vllm_stateful.adapters.engine import offload_tier

    return offload_tier.tier_of(tiers)
