# SPDX-License-Identifier: Apache-2.0
"""What a step of the engine core brings to model runner V2 beside vLLM's own."""

from __future__ import annotations

from typing import Any

from vllm_stateful.adapters.worker.ending_sampler import note_ends
from vllm_stateful.adapters.worker.lookup_speculator import note_requests


def note_step(runner: Any, scheduler_output: Any) -> None:
    """Hook of ``worker-requests``: a step begins, its new requests have their rows."""
    note_requests(runner, scheduler_output)
    note_ends(runner, scheduler_output)
