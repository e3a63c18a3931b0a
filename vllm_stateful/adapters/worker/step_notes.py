# SPDX-License-Identifier: Apache-2.0
"""Gives model runner V2 what the plugin's scheduler sends to the workers with a step."""

from __future__ import annotations

from typing import Any

from vllm_stateful.adapters.worker.ending_sampler import note_ends
from vllm_stateful.adapters.worker.lookup_speculator import note_requests


def note_step(runner: Any, scheduler_output: Any) -> None:
    """Hook of ``worker-requests``: called when a step begins and its new requests have rows."""
    note_requests(runner, scheduler_output)
    note_ends(runner, scheduler_output)
