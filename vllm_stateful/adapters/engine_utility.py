# SPDX-License-Identifier: Apache-2.0
"""What the API server may ask an engine core: about prompts, the response cache and sessions."""

from __future__ import annotations

from typing import Any

from vllm_stateful.adapters.fit import drift_of
from vllm_stateful.adapters.response_epoch import EPOCH, answer_epoch
from vllm_stateful.compat.ledger import patch_of

TRANSPORT = "transport"
"""The operation that asks whether the engine core puts prompts together from what is new."""


def answer(engine_core: Any, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Hook of ``engine-utility``: one operation, on the engine core's thread.

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
    from vllm_stateful.adapters.scheduler import answer_utility

    return answer_utility(engine_core.scheduler, operation, arguments)
