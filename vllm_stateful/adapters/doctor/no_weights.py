# SPDX-License-Identifier: Apache-2.0
"""Makes an engine core with a model that has shapes but no weights, to examine its KV cache.

vLLM's own code does all of it. The model is built on torch's device ``meta``. Its layers say what
KV they keep. From that, the engine core makes the groups, the managers and the scheduler. No memory
is taken for weights or KV, no device is touched, and nothing can be computed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from vllm.compilation.backends import set_model_tag
from vllm.config import replace, set_current_vllm_config
from vllm.distributed.parallel_state import (
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec
from vllm.v1.worker.worker_base import WorkerBase

from vllm_stateful.adapters.speculation import has_head
from vllm_stateful.errors import UnsupportedError

_LEAST_MEMORY = 1 << 28
_HEADS = ("eagle", "eagle3", "mtp")
"""Methods whose head is built like any model."""

_WITHOUT_KV = ("medusa", "mlp_speculator")


class Rehearsal(Executor):  # type: ignore[misc]
    """vLLM's executor, without workers."""

    def _init_executor(self) -> None:
        config = self.vllm_config
        with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"file://{Path(folder, 'store')}", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
                initialize_model(config)
                _build_head(config)
        current_platform.update_block_size_for_backend(config)
        self._specs = get_kv_cache_spec(config)

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        """The specs of the KV that the layers keep."""
        return [self._specs]

    def determine_available_memory(self) -> list[int]:
        """Bytes enough for a few requests; the real memory is not known."""
        sizes = [each.max_memory_usage_bytes(self.vllm_config) for each in self._specs.values()]
        return [max(4 * sum(sizes), _LEAST_MEMORY)]

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        """Make no KV cache and no connector.

        A connector would open ports and files, so it is examined by its class.
        """
        self.vllm_config.kv_transfer_config = None
        self.vllm_config.kv_events_config = None
        self.vllm_config.ec_transfer_config = None

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        """The layouts that a worker supports."""
        return [WorkerBase.get_supported_kv_cache_layouts(self)]

    def set_kv_cache_layout(self, *arguments: Any) -> None:
        """Do what a worker does; from vLLM 0.33 on there are two arguments."""
        WorkerBase.set_kv_cache_layout(self, *arguments)

    def collective_rpc(self, *_: Any, **__: Any) -> list[Any]:
        """Do nothing, because there is no worker to call."""
        return []

    def check_health(self) -> None:
        """Do nothing: the executor is always healthy."""


def _build_head(config: Any) -> None:
    """Build the drafting head beside the model, because its layers keep KV, too.

    Raises:
        UnsupportedError: vLLM's worker builds it in a way that is not followed here.
    """
    head = config.speculative_config
    if not has_head(config) or head.method in _WITHOUT_KV:
        return
    if head.method == "draft_model":
        own = replace(config, model_config=head.draft_model_config, quant_config=None)
        with set_model_tag("draft_model"):
            initialize_model(own, prefix="draft_model")
    elif head.method in _HEADS:
        with set_model_tag("eagle_head"):
            initialize_model(config, model_config=head.draft_model_config)
    else:
        raise UnsupportedError(f"vLLM's worker builds the head for {head.method!r} on the device")


def engine_core(config: Any) -> EngineCore:
    """The engine core of a configuration for one device; it changes the configuration."""
    return EngineCore(config, Rehearsal, log_stats=False)
