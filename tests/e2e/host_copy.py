# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU offload tier on a CPU: its own connector and manager, and a worker that copies.

vLLM's worker wants CUDA. This one copies between the same tensors when it is asked to, so all of
the scheduler's side runs as on a GPU. vLLM finds the spec by its module path.
"""

from __future__ import annotations

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class HostCopyWorker(OffloadingWorker):  # type: ignore[misc]
    """Copies blocks of one KV cache group; chunks are blocks."""

    def __init__(self, kv_caches: CanonicalKVCaches, num_chunks: int) -> None:
        self.pairs = [
            (cache.tensor, torch.zeros((num_chunks, cache.tensor.shape[1]), dtype=torch.int8))
            for cache in kv_caches.tensors
        ]
        self.done: list[int] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        for blocks, chunks in self.pairs:
            chunks[dst_spec.block_ids] = blocks[src_spec.block_ids]
        self.done.append(job_id)
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        for blocks, chunks in self.pairs:
            blocks[dst_spec.block_ids] = chunks[src_spec.block_ids]
        self.done.append(job_id)
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self.done = self.done, []
        return [TransferResult(job_id, success=True) for job_id in done]

    def wait(self, job_ids: set[int]) -> None:
        """All is done when it is submitted."""


class HostCopySpec(CPUOffloadingSpec):  # type: ignore[misc]
    """``CPUOffloadingSpec`` with that worker."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        return HostCopyWorker(kv_caches, self.num_chunks)
