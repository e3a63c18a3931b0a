# SPDX-License-Identifier: Apache-2.0
"""Plans of successive steps in device memory, over one set of buffers."""

from __future__ import annotations

import numpy as np
import torch

from vllm_stateful.attention.ops import DevicePlan
from vllm_stateful.attention.plan import Plan


class Workspace:
    """What all layers of a device share: partial results, counters, and the step's plan.

    Launches on one stream use it one after the other; it grows when a step needs more.
    """

    def __init__(self, head_size: int, device: torch.device) -> None:
        self._head_size = head_size
        self._device = device
        self._partials = torch.empty(0, device=device)
        self._lse = torch.empty(0, device=device)
        self._arrivals = torch.zeros(0, dtype=torch.int32, device=device)

    def upload(self, plan: Plan, rows: int) -> DevicePlan:
        """Copy a plan to the device, in one transfer that does not wait."""
        arrays = (plan.cta_segments, plan.segments, plan.units, plan.groups, plan.members)
        # The kernels read rows of 32 bytes: each array begins at a multiple of that.
        sizes = [-(-array.size // 8) * 8 for array in arrays]
        packed = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        starts = np.cumsum([0, *sizes])
        for array, start in zip(arrays, starts, strict=False):
            packed.numpy()[start : start + array.size] = array.ravel()
        there = packed.to(self._device, non_blocking=True)
        cta_segments, segments, units, groups, members = (
            there[start : start + array.size].view(array.shape)
            for array, start in zip(arrays, starts, strict=False)
        )
        slots = max(1, plan.num_slots)
        self._reserve(slots * rows, len(plan.units))
        size = self._head_size
        return DevicePlan(
            rows=rows,
            cta_segments=cta_segments,
            segments=segments,
            units=units,
            groups=groups,
            members=members,
            partial_out=self._partials[: slots * rows * size].view(slots, rows, size),
            partial_lse=self._lse[: slots * rows].view(slots, rows),
            arrivals=self._arrivals,
        )

    def _reserve(self, num_rows: int, num_units: int) -> None:
        if len(self._lse) < num_rows:
            self._partials = torch.empty(num_rows * self._head_size, device=self._device)
            self._lse = torch.empty(num_rows, device=self._device)
        if len(self._arrivals) < num_units:
            self._arrivals = torch.zeros(num_units, dtype=torch.int32, device=self._device)
