# SPDX-License-Identifier: Apache-2.0
"""torch.ops.vllm_stateful: loads the compiled kernels, and calls them with a plan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from vllm_stateful.attention.libraries import CUDA, library
from vllm_stateful.attention.plan import Plan

LIBRARY = library(CUDA)
BLOCK_KEYS = {"mma": {64: 64, 128: 64, 256: 32}, "wgmma": {64: 128, 128: 128, 256: 64}}
WGMMA_ROWS = 128


@cache
def why_unavailable() -> str:
    """Why the compiled kernels cannot be called here; empty if they can."""
    if not LIBRARY.exists():
        return "vllm_stateful was built without CUDA kernels (no nvcc was found then)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}"
    _register_fake()
    if not torch.ops.vllm_stateful.num_devices():
        return "no CUDA device is here"
    return ""


def _register_fake() -> None:
    @torch.library.register_fake("vllm_stateful::delta_append_attention")  # type: ignore[untyped-decorator]
    def _(*_: object) -> None:
        """Do nothing: the op only writes into its arguments."""


def block_keys(head_size: int, rows: int) -> int:
    """The number of keys of a block in the kernel for tiles of `rows` rows.

    Raises:
        ValueError: there is no kernel for this head size.
    """
    keys = BLOCK_KEYS["wgmma" if rows == WGMMA_ROWS else "mma"].get(head_size)
    if keys is None:
        raise ValueError(f"no kernel for head size {head_size}")
    return keys


def num_ctas(
    dtype: torch.dtype, head_size: int, rows: int, device: int, *, fp8: bool = False
) -> int:
    """The number of thread blocks that are resident at once on a device: the grid of a plan.

    Args:
        dtype: The dtype of the result.
        head_size: Elements of one head.
        rows: Rows of a tile.
        device: The index of the device.
        fp8: Whether the cache and the queries are fp8.

    Raises:
        RuntimeError: the kernels are not available, or this one is not available on this device.
    """
    if reason := why_unavailable():
        raise RuntimeError(reason)
    half = dtype == torch.float16
    return int(torch.ops.vllm_stateful.num_ctas(half, fp8, head_size, rows, device))


class Scales(NamedTuple):
    """The value of one unit of fp8 queries, keys and values: float32, single or ``[KV heads]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@cache
def no_scales(device: torch.device) -> Scales:
    """The scales of tensors that are not quantized."""
    nothing = torch.empty(0, device=device)
    return Scales(nothing, nothing, nothing)


@dataclass
class DevicePlan:
    """A plan in device memory, and the memory for its partial results.

    Attributes:
        rows: Rows of a tile.
        cta_segments: See `plan.Plan`, as for the other arrays of the plan.
        partial_out: ``[slots, rows, D]`` float32.
        partial_lse: ``[slots, rows]`` float32: logarithms to base 2 of the sums of weights.
        arrivals: ``[slots]`` int32: counters, zero before and after each launch.
    """

    rows: int
    cta_segments: torch.Tensor
    segments: torch.Tensor
    units: torch.Tensor
    groups: torch.Tensor
    members: torch.Tensor
    partial_out: torch.Tensor
    partial_lse: torch.Tensor
    arrivals: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors, in the order of the op's arguments."""
        return (
            self.cta_segments,
            self.segments,
            self.units,
            self.groups,
            self.members,
            self.partial_out,
            self.partial_lse,
            self.arrivals,
        )

    @classmethod
    def of(cls, plan: Plan, rows: int, head_size: int, device: torch.device) -> DevicePlan:
        """Copy a plan to the device, and allocate memory for its partial results."""
        slots = max(1, plan.num_slots)
        return cls(
            rows=rows,
            cta_segments=torch.from_numpy(plan.cta_segments).to(device),
            segments=torch.from_numpy(plan.segments).to(device),
            units=torch.from_numpy(plan.units).to(device),
            groups=torch.from_numpy(plan.groups).to(device),
            members=torch.from_numpy(plan.members).to(device),
            partial_out=torch.empty(slots, rows, head_size, device=device),
            partial_lse=torch.empty(slots, rows, device=device),
            arrivals=torch.zeros(slots, dtype=torch.int32, device=device),
        )


def delta_append_attention(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    kv_cache: torch.Tensor,
    out: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_mapping: torch.Tensor,
    plan: DevicePlan,
    scale: float,
    *,
    soft_cap: float = 0.0,
    window: int = 0,
    scales: Scales | None = None,
) -> None:
    """Attend from new tokens to a paged cache and themselves, and append K and V, in one launch.

    Args:
        q: ``[tokens, heads, D]``, with the dtype of the cache. D is 64, 128 or 256.
        k_new: ``[tokens, KV heads, D]``, bfloat16 or float16.
        v_new: ``[tokens, KV heads, D]``, bfloat16 or float16.
        kv_cache: ``[blocks, KV heads, page, 2 D]``, K then V, any strides; written. Its dtype is
            that of `k_new`, or fp8 (e4m3). With fp8, the attention uses new K and V as rounded.
        out: ``[tokens, heads, D]``, with the dtype of `k_new`; written.
        block_table: ``[sequences, pages]`` int32.
        query_start: ``[sequences + 1]`` int32: the first new token of each sequence, and the end.
        seq_lens: ``[sequences]`` int32: cached and new tokens of each sequence.
        slot_mapping: ``[tokens]`` int64: the slot of each token; -1: not appended.
        plan: A plan for these lengths, this head size and this device.
        scale: The factor of the scores.
        soft_cap: Scores become ``cap * tanh(score / cap)``; 0: no cap.
        window: Keys that a token sees, its own included; 0: all.
        scales: The scales of an fp8 cache; None for other caches.

    Raises:
        RuntimeError: the kernels are not available here, or the tensors do not fit.
    """
    if reason := why_unavailable():
        raise RuntimeError(reason)
    scales = scales or no_scales(q.device)
    torch.ops.vllm_stateful.delta_append_attention(
        q,
        k_new,
        v_new,
        kv_cache,
        out,
        block_table,
        query_start,
        seq_lens,
        slot_mapping,
        *plan.tensors(),
        *scales,
        plan.rows,
        scale,
        soft_cap,
        window,
    )
