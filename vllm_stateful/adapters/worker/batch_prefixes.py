# SPDX-License-Identifier: Apache-2.0
"""In the worker: tells a metadata builder which requests of its batch share leading keys.

A metadata builder sees rows, not requests. Model runner V2 gives it the array that maps rows to
requests (``req_idx``), and makes a new array for every step. The identity of this array ties a
builder's batch to the ``SchedulerOutput`` that it came from. Dummy runs, captured graphs,
microbatches and model runner V1 have another array, or none, and find nothing shared.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm_stateful.adapters.slots import of_step
from vllm_stateful.attention.plan import SharedPrefix
from vllm_stateful.attention.shared_prefixes import SharedKeys, in_batch


class _Step(NamedTuple):
    req_idx: Any
    names: list[str]
    shared: tuple[SharedKeys, ...]


_step: _Step | None = None
"""The last step that was prepared in this process. It keeps a reference on the array: otherwise the
array could be freed, and a new one at the same address would look like it."""


def note_batch(batch: Any, scheduler_output: Any) -> None:
    """Hook of ``worker-batch``: remember the order of a step's requests, and what they share."""
    global _step
    shared = of_step(scheduler_output).shared
    _step = _Step(batch.idx_mapping_np, batch.req_ids, shared) if shared else None


def shared_in(builder: Any, common: Any) -> list[SharedPrefix]:
    """The prefixes that the requests of a batch share, by their places in it.

    Args:
        builder: A metadata builder.
        common: The ``CommonAttentionMetadata`` that it was given.

    Returns:
        The prefixes; empty if they are not known for this batch, or if a layer has a window.
    """
    if _step is None or common.req_idx is not _step.req_idx or not _sees_all_keys(builder):
        return []
    return in_batch(_step.shared, _step.names)


def _sees_all_keys(builder: Any) -> bool:
    """Whether no layer has a window. A layer of which this is not known counts as having one."""
    if getattr(builder.kv_cache_spec, "sliding_window", 0) is not None:
        return False
    layers = builder.vllm_config.compilation_config.static_forward_context
    impls = (getattr(layers.get(name), "impl", None) for name in builder.layer_names)
    return all(getattr(impl, "sliding_window", None) == (-1, -1) for impl in impls)
