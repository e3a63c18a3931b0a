# SPDX-License-Identifier: Apache-2.0
"""Replaces vLLM's attention backend with ours, or puts vLLM's back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_stateful.attention.libraries import CPU, CUDA, library

logger = init_logger("vllm.stateful")

STEPS: Counter[str] = Counter()
"""Steps of the worker in this process: "taken" by our kernels, or why vLLM's kernels served
them."""


class Place(NamedTuple):
    """One of vLLM's backends, and the backend of ours that replaces it.

    Attributes:
        stock: vLLM's name of its backend.
        backend: the path of our class.
        library: the file with our kernels.
        is_measured: whether our kernels were measured to be faster, so that ``auto`` uses them.
        feature: the feature that lists what our backend uses of vLLM (`compat.uses`).
    """

    stock: AttentionBackendEnum
    backend: str
    library: Path
    is_measured: bool
    feature: str


ON_CUDA = Place(
    AttentionBackendEnum.FLASH_ATTN,
    "vllm_stateful.adapters.worker.attention_backend.StatefulAttentionBackend",
    library(CUDA),
    is_measured=False,
    feature="attention-cuda",
)
ON_CPU = Place(
    AttentionBackendEnum.CPU_ATTN,
    "vllm_stateful.adapters.worker.cpu_attention_backend.StatefulCPUBackend",
    library(CPU),
    is_measured=True,
    feature="attention-cpu",
)


def choose_attention(
    choice: str,
    report_problem: Callable[[str], None],
    place: Place | None = None,
    fits: Callable[[str], bool] = lambda feature: True,
) -> None:
    """Apply ``--stateful-attention``, through vLLM's registry. This touches no device.

    Args:
        choice: "off"; "auto", which uses our kernels if they were built and measured; or "on",
            which uses them if they were built and reports a problem if not.
        report_problem: Called with the reason why the backend is not replaced.
        place: The backend to replace; by default that of this platform.
        fits: Tells whether this vLLM has what a feature uses, and logs it if not.
    """
    if place is None:
        place = ON_CPU if current_platform.is_cpu() else ON_CUDA
    stock = place.stock
    is_ours = stock.get_path() == place.backend
    if choice == "off" or (choice == "auto" and not place.is_measured):
        if is_ours:
            stock.clear_override()
        return
    reason = "" if place.library.exists() else f"{place.library.name} was not built"
    if stock.is_overridden() and not is_ours:
        reason = f"{stock.name} is {stock.get_path()}"
    if not reason and not fits(place.feature):
        if is_ours:
            stock.clear_override()
    elif not reason and not is_ours:
        register_backend(stock, place.backend)
    elif reason and choice == "on":
        report_problem(reason)
    elif reason:
        logger.info("stateful: attention is left to vLLM: %s", reason)


def is_cuda_backend_chosen() -> bool:
    """Whether our backend with the CUDA kernels replaces one of vLLM's backends."""
    stocks = (ON_CUDA.stock, ON_CPU.stock)  # on a CPU its launches are emulated
    return any(stock.get_path() == ON_CUDA.backend for stock in stocks)
