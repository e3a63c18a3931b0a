# SPDX-License-Identifier: Apache-2.0
"""vLLM's model runner V2, the one of CUDA, on a host without a GPU. Import before vLLM.

vLLM 0.32 runs it on a CPU where Triton has a CPU backend. Here Triton's interpreter stands in:
slow, and exact. Streams and events do nothing on a CPU, so what is not seen here is a missing wait.
"""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

os.environ |= {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

from triton.backends import backends
from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

NO_DRIVER = SimpleNamespace(is_active=lambda: False)
backends["cpu"] = SimpleNamespace(driver=NO_DRIVER, compiler=None)


def take_any_mask() -> None:
    """Where a mask was made from a scalar numpy widens its booleans, and the interpreter stops."""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def masked_load(self: Any, pointers: Any, mask: Any, *more: Any, **named: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return load(self, pointers, mask, *more, **named)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return store(self, pointers, value, mask, *more)

    InterpreterBuilder.create_masked_load = masked_load
    InterpreterBuilder.create_masked_store = masked_store


take_any_mask()


def skip_overflow_checks() -> None:
    """A quarter of the interpreter's time; `lookup.py` has our own kernels checked."""
    options = interpreter_builder.options
    interpreter_builder.options = replace(options, sanitize_overflow=False)


def allow_async_scheduling() -> None:
    """vLLM switches it off on a CPU, where it brings nothing; here it is what CUDA does."""
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        wanted = config.scheduler_config.async_scheduling
        stock(cls, config)
        config.scheduler_config.async_scheduling = wanted

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def take_cuda_state_kernels() -> None:
    """Mamba 2 decodes with vLLM's Triton kernels. Call before a model is imported.

    vLLM's kernel for a CPU knows nothing of drafts: it writes the state behind all of them where
    that of the first belongs.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    is_cpu = platform.is_cpu
    platform.is_cpu = lambda self: False
    try:
        from vllm.model_executor.layers.mamba.ops import causal_conv1d, mamba_ssm, ssu_dispatch
    finally:
        platform.is_cpu = is_cpu
    from vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d import causal_conv1d_fn_cpu

    causal_conv1d.causal_conv1d_fn = causal_conv1d_fn_cpu  # the interpreter stops in Triton's
    backends = ssu_dispatch._BACKEND_REGISTRY
    backends[ssu_dispatch.MambaBackendEnum.CPU] = backends[ssu_dispatch.MambaBackendEnum.TRITON]
    mamba_ssm._ssm_config_override = (64, 4)  # fewer programs to interpret
