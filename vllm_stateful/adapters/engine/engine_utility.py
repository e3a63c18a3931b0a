# SPDX-License-Identifier: Apache-2.0
"""Answers the API server's questions about prompts, the response cache and sessions."""

from __future__ import annotations

from typing import Any

from vllm_stateful.adapters.fit import drift_of
from vllm_stateful.compat.ledger import patch_of
from vllm_stateful.transport.wire import EPOCH, TRANSPORT


def answer(engine_core: Any, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Hook of ``engine-utility``: answer one operation, on the engine core's thread.

    Raises:
        ValueError: no such operation.
    """
    if operation == TRANSPORT:
        applied = [patch_of(name).is_applied for name in ("prompt-handover", "prompt-miss")]
        return {"ready": all(applied)}
    if operation == EPOCH:
        return answer_epoch(engine_core, **arguments)
    drift = drift_of("sessions", "engine")
    if drift is not None:
        return {"off": drift}
    from vllm_stateful.adapters.engine.scheduler import answer_utility

    return answer_utility(engine_core.scheduler, operation, arguments)


def answer_epoch(engine_core: Any, *, begins: bool = False) -> dict[str, Any]:
    """How often the model or its caches have changed; ``begins`` adds one."""
    epoch = int(getattr(engine_core, "stateful_epoch", 0)) + begins
    engine_core.stateful_epoch = epoch
    return {EPOCH: epoch}
