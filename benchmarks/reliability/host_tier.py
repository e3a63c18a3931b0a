# SPDX-License-Identifier: Apache-2.0
"""vLLM's offload tier with a file system behind it, on a CPU.

vLLM's own worker for the tier refuses a CPU. This one copies between the KV cache and the memory
that vLLM shares with the scheduler's side; the scheduler's side, which writes and reads the files,
is vLLM's. vLLM finds the spec by its module path.
"""

from __future__ import annotations

from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class SharedCopyWorker(OffloadingWorker):  # type: ignore[misc]
    """Copies blocks of one KV cache group into shared memory and back; chunks are blocks."""

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self.region = region
        self.pairs = [
            (cache.tensor, region.create_next_worker_view(cache.tensor.shape[1]))
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

    def shutdown(self) -> None:
        self.pairs.clear()
        self.region.cleanup()


class HostTieringSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """``TieringOffloadingSpec`` with that worker."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        region = SharedOffloadRegion(
            engine_id=self.config.engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return SharedCopyWorker(kv_caches, region)
