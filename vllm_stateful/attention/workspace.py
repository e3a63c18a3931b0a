# SPDX-License-Identifier: Apache-2.0
"""Keeps the plans of successive steps in device memory, in one set of buffers.

A `Workspace` grows as steps need more. A `GraphWorkspace` never moves: a CUDA graph that was
captured with its addresses replays whatever plan it contains.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_stateful.attention.ops import DevicePlan
from vllm_stateful.attention.plan import Ints, Plan


class Workspace:
    """What all layers on a device share: partial results, counters, and the step's plan.

    The launches on one stream use it one after the other. It grows when a step needs more.
    """

    def __init__(self, head_size: int, device: torch.device) -> None:
        self._head_size = head_size
        self._device = device
        self._partials = torch.empty(0, device=device)
        self._lse = torch.empty(0, device=device)
        self._arrivals = torch.zeros(0, dtype=torch.int32, device=device)

    def upload(self, plan: Plan, rows: int) -> DevicePlan:
        """Copy a plan to the device in one transfer, without waiting for it."""
        arrays = (plan.cta_segments, plan.segments, plan.units, plan.groups, plan.members)
        # The kernels read rows of 32 bytes, so each array must begin at a multiple of that.
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
        self._reserve(slots, rows)
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

    def _reserve(self, slots: int, rows: int) -> None:
        if len(self._lse) < slots * rows:
            self._partials = torch.empty(slots * rows * self._head_size, device=self._device)
            self._lse = torch.empty(slots * rows, device=self._device)
        if len(self._arrivals) < slots:
            self._arrivals = torch.zeros(slots, dtype=torch.int32, device=self._device)


class GraphWorkspace:
    """Fixed memory for the plan of the current step, for steps that CUDA graphs replay.

    Args:
        rows: Rows of the tiles, in every plan.
        num_ctas: Thread blocks, in every plan.
        most_units: The most units of a plan.
        head_size: Elements of one head.
        device: Where the memory is.
    """

    def __init__(
        self, rows: int, num_ctas: int, most_units: int, head_size: int, device: torch.device
    ) -> None:
        # Each cut adds a segment, and at most splits a unit with one part into two. A shared prefix
        # is an item of its own, and each of its segments adds a part to every member.
        capacity = {
            "cta_segments": (num_ctas + 1,),
            "segments": (2 * most_units + num_ctas, 8),
            "units": (most_units, 8),
            "groups": (most_units, 4),
            "members": (most_units, 2),
        }
        ints = {"dtype": torch.int32, "device": device}
        tables = {name: torch.zeros(shape, **ints) for name, shape in capacity.items()}
        num_slots = 4 * num_ctas
        self.plan = DevicePlan(
            rows=rows,
            **tables,
            partial_out=torch.empty(num_slots, rows, head_size, device=device),
            partial_lse=torch.empty(num_slots, rows, device=device),
            arrivals=torch.zeros(num_slots, **ints),
        )

    def fits(self, plan: Plan) -> bool:
        """Whether there is room for a plan. A plan without shared prefixes always fits."""
        return plan.num_slots <= len(self.plan.partial_lse) and all(
            len(array) <= len(there) for array, there in self._pairs(plan)
        )

    def upload(self, plan: Plan) -> DevicePlan:
        """Copy a plan to its place, without waiting for it.

        On the stream the copy comes after the launches that read the plan before.

        Raises:
            ValueError: the plan does not fit.
        """
        if not self.fits(plan) or len(plan.cta_segments) != len(self.plan.cta_segments):
            raise ValueError("a plan that does not fit the memory of the CUDA graphs")
        for array, there in self._pairs(plan):
            if len(array):
                source = torch.from_numpy(array)
                if there.is_cuda:
                    source = source.pin_memory()
                there[: len(array)].copy_(source, non_blocking=True)
        return self.plan

    def _pairs(self, plan: Plan) -> list[tuple[Ints, torch.Tensor]]:
        return [
            (plan.cta_segments, self.plan.cta_segments),
            (plan.segments, self.plan.segments),
            (plan.units, self.plan.units),
            (plan.groups, self.plan.groups),
            (plan.members, self.plan.members),
        ]
