# SPDX-License-Identifier: Apache-2.0
"""Asks an engine core's scheduler what it would do."""

from __future__ import annotations

from typing import Any

from vllm_stateful.adapters.engine.kv_groups import group_of, kinds_of
from vllm_stateful.adapters.engine.scheduler import (
    StatefulAsyncScheduler,
    StatefulScheduler,
    unsupported_reason,
)
from vllm_stateful.errors import UnsupportedError


def groups_of(scheduler: Any) -> str:
    """A text about the groups of the KV cache and the length of their blocks in tokens."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    if not managers:
        return "none"
    try:
        names = kinds_of([group_of(each) for each in managers])
    except UnsupportedError:
        kinds = [type(each.kv_cache_spec).__name__ for each in managers]
        names = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    sizes = sorted({int(each.block_size) for each in managers})
    return f"{names}; blocks of {' and '.join(map(str, sizes))} tokens"


def off_reason_of(scheduler: Any, connector: Any) -> str | None:
    """Why no sessions are kept; None when they are.

    Args:
        scheduler: the scheduler of an engine core without a connector.
        connector: the connector that would be beside it; None without one.
    """
    if not isinstance(scheduler, StatefulScheduler | StatefulAsyncScheduler):
        return f"the scheduler is {type(scheduler).__name__}"
    scheduler.connector = connector
    return unsupported_reason(scheduler)
