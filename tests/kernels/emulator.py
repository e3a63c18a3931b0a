# SPDX-License-Identifier: Apache-2.0
"""Builds csrc/emulator and runs a step's attention in it, over tensors on the host."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from vllm_stateful.attention.plan import Plan

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CUDA_HEADERS = (Path("/usr/local/cuda/include"), Path("/usr/include"))
FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas")
# Head size 64 and bfloat16 only, and a tree of nodes already where a unit has few parts.
FEW = ("-DSTATEFUL_EMULATE_FEW", "-DSTATEFUL_FAN_IN=3", "-O1")
WATCHED = (*FEW, "-g", "-fsanitize=address")  # see random_steps.py
POINTERS = ("q", "k_new", "v_new", "out", "cache", "partial_out", "partial_lse", "arrivals")
TABLES = ("block_table", "query_start", "seq_lens", "slot_mapping")
SCALES = ("q_scale", "k_scale", "v_scale")
STRIDES = ("q", "k", "v", "out")


def cuda_headers() -> Path | None:
    """Where the types of bfloat16 and half are declared: no GPU and no nvcc is needed."""
    nvcc = shutil.which("nvcc")
    beside = (Path(nvcc).resolve().parents[1] / "include",) if nvcc else ()
    for folder in (*beside, *CUDA_HEADERS):
        if (folder / "cuda_bf16.h").exists():
            return folder
    return None


class PlanPointers(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("cta_segments", "segments", "units", "groups", "members")
    ]


class Params(ctypes.Structure):
    """csrc/include/stateful/plan.cuh: Params."""

    _fields_ = [
        ("plan", PlanPointers),
        *[(name, ctypes.c_void_p) for name in (*POINTERS, *TABLES, *SCALES)],
        *[(f"{name}_{what}", ctypes.c_int64) for name in STRIDES for what in ("token", "head")],
        *[(f"cache_{name}", ctypes.c_int64) for name in ("block", "token", "head", "v")],
        *[(name, ctypes.c_int32) for name in ("group_size", "page_size", "table_stride")],
        *[(f"{name}_head", ctypes.c_int32) for name in SCALES],
        ("window", ctypes.c_int32),
        *[(name, ctypes.c_float) for name in ("scale", "soft_cap")],
    ]


class Options(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_int32),
        ("most_alive", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("num_kv_heads", ctypes.c_int32),
        ("num_tokens", ctypes.c_int32),
        ("num_blocks", ctypes.c_int32),
        ("is_fp8", ctypes.c_int32),
    ]


@dataclass
class Step:
    """One layer's attention in one step.

    Attributes:
        q: ``[tokens, heads, D]``, bfloat16 or float16, as `out`, `k_new` and `v_new`
            (``[tokens, KV heads, D]``); the last dimension is contiguous.
        cache: ``[blocks, KV heads, page, 2 D]``, any strides but the last: K, then V.
        block_table: ``[sequences, pages]`` int32.
        query_start: ``[sequences + 1]`` int32.
        seq_lens: ``[sequences]`` int32, cached and new.
        slot_mapping: ``[tokens]`` int64; -1: not appended.
        scales: of `q`, keys and values where these are fp8: float32, one or ``[KV heads]``.
    """

    q: torch.Tensor
    k_new: torch.Tensor
    v_new: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: torch.Tensor
    scale: float
    window: int = 0
    soft_cap: float = 0.0
    scales: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    out: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.out = torch.full(self.q.shape, float("nan"), dtype=self.k_new.dtype)

    @property
    def head_size(self) -> int:
        return int(self.q.shape[2])

    @property
    def group_size(self) -> int:
        return int(self.q.shape[1] // self.k_new.shape[1])


class HangError(Exception):
    """No thread of the kernel can go on."""


def build(folder: Path, sources: Path = CSRC, flags: tuple[str, ...] = ()) -> Path:
    """Compile the kernels of a folder of sources.

    Args:
        flags: `FEW`, `WATCHED` or none.

    Raises:
        RuntimeError: what the compiler says.
    """
    library = folder / "emulator.so"
    includes = [f"-I{sources / 'include'}", f"-I{sources / 'emulator'}", "-isystem", cuda_headers()]
    command = ["g++", *FLAGS, *flags, *includes, sources / "emulator" / "emulate.cpp"]
    done = subprocess.run(
        [*map(str, command), "-o", str(library)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return library


class Emulator:
    """The kernels of a library that `build` made."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self.sizes = [self._library.stateful_sizes(index) for index in range(5)]

    def run(
        self, step: Step, plan: Plan, kernel: str, rows: int, seed: int, alive: int = 3
    ) -> None:
        """Fill `step.out`, and append to `step.cache`, with the kernel for tiles of `rows`."""
        params, kept = _params(step, plan, rows)
        tokens, num_kv_heads, _ = step.k_new.shape
        grid = len(plan.cta_segments) - 1
        is_fp8 = step.scales is not None
        options = Options(grid, alive, seed, num_kv_heads, tokens, len(step.cache), is_fp8)
        call = getattr(self._library, f"stateful_emulate_{kernel}")
        is_half = int(step.out.dtype == torch.float16)
        code = call(is_half, step.head_size, rows, ctypes.byref(params), ctypes.byref(options))
        if code == 2:
            raise HangError
        assert code == 0, f"no kernel {kernel} of head size {step.head_size} and {rows} rows"
        assert not kept["arrivals"].any(), "the counters are not ready for the next launch"


def _params(step: Step, plan: Plan, rows: int) -> tuple[Params, dict[str, torch.Tensor]]:
    num_slots = max(1, plan.num_slots)
    kept = {
        "partial_out": torch.full((num_slots, rows, step.head_size), float("nan")),
        "partial_lse": torch.full((num_slots, rows), float("nan")),
        "arrivals": torch.zeros(num_slots, dtype=torch.int32),
    }
    tensors = {name: kept[name] if name in kept else getattr(step, name) for name in POINTERS}
    tensors |= {name: getattr(step, name) for name in TABLES}
    scales = dict(zip(SCALES, step.scales or (), strict=False))
    tensors |= scales
    scale = step.scale if step.soft_cap else step.scale * float(np.log2(np.e))
    strides = {"q": step.q, "k": step.k_new, "v": step.v_new, "out": step.out}
    block, head, token, _ = step.cache.stride()
    params = Params(
        plan=PlanPointers(
            *[
                array.ctypes.data
                for array in (
                    plan.cta_segments,
                    plan.segments,
                    plan.units,
                    plan.groups,
                    plan.members,
                )
            ]
        ),
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        **{f"{name}_token": tensor.stride(0) for name, tensor in strides.items()},
        **{f"{name}_head": tensor.stride(1) for name, tensor in strides.items()},
        cache_block=block,
        cache_token=token,
        cache_head=head,
        cache_v=step.head_size,
        group_size=step.group_size,
        page_size=step.cache.shape[2],
        table_stride=step.block_table.stride(0),
        **{f"{name}_head": int(each.numel() > 1) for name, each in scales.items()},
        window=step.window,
        scale=scale,
        soft_cap=step.soft_cap,
    )
    return params, kept
