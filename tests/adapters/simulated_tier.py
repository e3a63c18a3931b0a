# SPDX-License-Identifier: Apache-2.0
"""The worker's side of vLLM's offload tier, over the slots of a simulated worker.

As late as the protocol allows: a store reads its blocks, and a load writes them, only when it
reports its end, some steps after the scheduler asked for it; unless the scheduler flushes it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingWorkerMetadata,
    TransferJob,
)
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.outputs import KVConnectorOutput


def offloading(num_chunks: int, policy: str = "StatefulCachePolicy") -> KVTransferConfig:
    """vLLM's configuration of a CPU tier of so many chunks of one block."""
    extra: dict[str, Any] = {
        "cpu_bytes_to_use": num_chunks * CPUOffloadingSpec.BLOCK_SIZE_ALIGNMENT,
        "spec_name": "CPUOffloadingSpec",
        "eviction_policy": policy,
        "offload_prompt_only": False,
    }
    if policy == "StatefulCachePolicy":
        extra["cache_policy_module_path"] = "vllm_stateful.adapters.offload_policy"
    return KVTransferConfig(
        kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=extra
    )


class _Pending(NamedTuple):
    due: int
    job: TransferJob
    is_store: bool


class SimulatedTier:
    """Chunks of slots on the host.

    ``lost`` is empty: no load fails.

    Args:
        slots: those of the worker, shape ``[num_blocks][block_size]``.
        delay: steps from the step that carries a job to the one that does it.
    """

    def __init__(self, slots: list[list[int]], delay: int = 2) -> None:
        self.slots = slots
        self.delay = delay
        self.chunks: dict[int, list[int]] = {}
        self.num_loaded = 0
        self.lost: set[int] = set()
        self._step = 0
        self._pending: dict[int, _Pending] = {}
        self._done = OffloadingWorkerMetadata()
        self._received: set[str] = set()

    def begin(self, meta: Any) -> None:
        """Before the step computes: what is due, and what must be done now."""
        self._step += 1
        for job_id, job in meta.load_jobs.items():
            self._pending[job_id] = _Pending(self._step + self.delay, job, is_store=False)
        for job_id in meta.jobs_to_flush or ():
            job = meta.store_jobs.pop(job_id, None)
            if job is not None:
                self._pending[job_id] = _Pending(0, job, is_store=True)
            if job_id in self._pending:
                self._finish(job_id)
        for job_id in [n for n, pending in self._pending.items() if pending.due <= self._step]:
            self._finish(job_id)

    def end(self, meta: Any) -> KVConnectorOutput | None:
        """After the step has computed; what to report with its output."""
        for job_id, job in meta.store_jobs.items():
            self._pending[job_id] = _Pending(self._step + self.delay, job, is_store=True)
        done, self._done = self._done, OffloadingWorkerMetadata()
        received, self._received = self._received, set()
        if not done.completed_jobs:
            return None
        return KVConnectorOutput(finished_recving=received, kv_connector_worker_meta=done)

    def _finish(self, job_id: int) -> None:
        _, job, is_store = self._pending.pop(job_id)
        source, target = job.src_spec.block_ids.tolist(), job.dst_spec.block_ids.tolist()  # type: ignore[attr-defined]
        assert len(source) == len(target)
        for here, there in zip(source, target, strict=True):
            if is_store:
                self.chunks[there] = list(self.slots[here])
            else:
                self.slots[there] = list(self.chunks[here])
                self.num_loaded += 1
        self._done.mark_completed(job_id)
        if not is_store:
            self._received.add(job.req_id)
