# SPDX-License-Identifier: Apache-2.0
"""In the worker: which requests of the batch at hand share leading keys.

A metadata builder sees rows, not requests. Model runner V2 gives it the very array that says which
request each row is (``req_idx``), made anew for every step: that ties a builder's batch to the
``SchedulerOutput`` it came from. Dummy runs, captured graphs, microbatches and model runner V1 come
with another array, or with none, and find nothing.
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
"""The last step that was prepared in this process; its array is held, so that no other array can
be taken for it."""


def note_batch(batch: Any, scheduler_output: Any) -> None:
    """Hook of ``worker-batch``: the requests of a step have their order."""
    global _step
    shared = of_step(scheduler_output).shared
    _step = _Step(batch.idx_mapping_np, batch.req_ids, shared) if shared else None


def shared_in(builder: Any, common: Any) -> list[SharedPrefix]:
    """What the requests of a batch share, by their places in it; nothing where it is not known.

    Args:
        builder: A metadata builder.
        common: The ``CommonAttentionMetadata`` that it was given.
    """
    if _step is None or common.req_idx is not _step.req_idx or not _sees_all_keys(builder):
        return []
    return in_batch(_step.shared, _step.names)


def _sees_all_keys(builder: Any) -> bool:
    """Whether no layer has a window; one of which that is not known counts as if it had."""
    if getattr(builder.kv_cache_spec, "sliding_window", 0) is not None:
        return False
    layers = builder.vllm_config.compilation_config.static_forward_context
    impls = (getattr(layers.get(name), "impl", None) for name in builder.layer_names)
    return all(getattr(impl, "sliding_window", None) == (-1, -1) for impl in impls)
