# SPDX-License-Identifier: Apache-2.0
"""Putting our attention backend in the place of vLLM's FlashAttention, or taking it back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

import vllm_stateful

logger = init_logger("vllm.stateful")

BACKEND = "vllm_stateful.adapters.attention_backend.StatefulAttentionBackend"
LIBRARY = Path(vllm_stateful.__file__).parent / "_C.abi3.so"

STEPS: Counter[str] = Counter()
"""Steps of the worker in this process: "taken" by our kernels, or why vLLM's served them."""


def choose_attention(choice: str, report_problem: Callable[[str], None]) -> None:
    """Follow ``--stateful-attention``, through vLLM's registry. No device is touched here.

    Args:
        choice: "off", "auto" (where the kernels were built) or "on" (a problem where not).
        report_problem: Told why the backend is left as it is.
    """
    flash = AttentionBackendEnum.FLASH_ATTN
    is_ours = flash.get_path() == BACKEND
    reason = "" if LIBRARY.exists() else "the attention kernels were not built (no nvcc then)"
    if flash.is_overridden() and not is_ours:
        reason = f"FLASH_ATTN is {flash.get_path()}"
    if choice == "off" or reason:
        if is_ours:
            flash.clear_override()
        if choice == "on":
            report_problem(reason)
        elif choice == "auto":
            logger.info("stateful: attention is left to vLLM: %s", reason)
        return
    if not is_ours:
        register_backend(flash, BACKEND)
