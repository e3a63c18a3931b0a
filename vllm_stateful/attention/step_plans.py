# SPDX-License-Identifier: Apache-2.0
"""The plan of each step, on the device. A new one is made only when the last does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vllm_stateful.attention import ops
from vllm_stateful.attention.choice import Graphs, Layers, tile_rows
from vllm_stateful.attention.plan import Ints, Plan, Shape, SharedPrefix, make_plan
from vllm_stateful.attention.shared_prefixes import tiles_to_share
from vllm_stateful.attention.workspace import GraphWorkspace, Workspace


@dataclass
class StepPlans:
    """The plans for the layers of one metadata builder, step by step.

    A plan counts in blocks of keys, and the kernels clamp it to the lengths in device memory. So a
    plan is valid until a sequence fills a block (32 to 128 keys) or the batch changes.

    Attributes:
        layers: What the layers have in common.
        graphs: The steps that CUDA graphs may replay.
        num_kv_heads: KV heads of a layer, on this device.
        dtype: The dtype of the result.
        most_requests: The most sequences in a step that a CUDA graph replays.
        device: The device of the plans.
        num_made: Plans made so far.
    """

    layers: Layers
    graphs: Graphs
    num_kv_heads: int
    dtype: torch.dtype
    most_requests: int
    device: torch.device
    num_made: int = 0
    _shapes: dict[int, Shape] = field(default_factory=dict)
    _in_graphs: dict[int, GraphWorkspace] = field(default_factory=dict)
    _last: tuple[object, ops.DevicePlan] | None = None

    def __post_init__(self) -> None:
        self._workspace = Workspace(self.layers.head_size, self.device)

    def of(
        self,
        query_lens: Ints,
        seq_lens: Ints,
        max_query_len: int,
        shared: Sequence[SharedPrefix] = (),
    ) -> ops.DevicePlan:
        """The plan of a step, ready for launches on the current stream.

        Args:
            query_lens: New tokens of each sequence.
            seq_lens: Cached and new keys of each sequence, or upper bounds of them.
            max_query_len: The maximum of `query_lens`, or the length that a graph was captured for.
            shared: The prefixes that sequences share. They are used only where it pays.
        """
        graphs = self._graph_workspace(max_query_len)
        rows, prefixes = tiles_to_share(
            shared,
            query_lens,
            seq_lens,
            max_query_len,
            self.layers,
            rows=None if graphs is None else graphs.plan.rows,
        )
        shape = self._shape(rows)
        cached = -(-(seq_lens - query_lens) // shape.block_keys) * shape.block_keys
        key = (graphs is None, rows, query_lens.tobytes(), cached.tobytes(), tuple(prefixes))
        if self._last is None or self._last[0] != key:
            # Layers may have different windows, so the plan covers all keys and the kernels mask.
            plan = make_plan(query_lens, cached + query_lens, shape, prefixes=prefixes, exact=False)
            if graphs is not None and not graphs.fits(plan):
                plan = make_plan(query_lens, cached + query_lens, shape, exact=False)
            self._last = key, self._upload(plan, rows, graphs)
            self.num_made += 1
        return self._last[1]

    def _upload(self, plan: Plan, rows: int, graphs: GraphWorkspace | None) -> ops.DevicePlan:
        return self._workspace.upload(plan, rows) if graphs is None else graphs.upload(plan)

    def _shape(self, rows: int) -> Shape:
        if rows not in self._shapes:
            size, fp8 = self.layers.head_size, self.layers.is_fp8
            self._shapes[rows] = Shape(
                num_ctas=ops.num_ctas(self.dtype, size, rows, self.device.index or 0, fp8=fp8),
                tile_rows=rows,
                block_keys=ops.block_keys(size, rows),
                num_kv_heads=self.num_kv_heads,
                group_size=self.layers.group_size,
            )
        return self._shapes[rows]

    def _graph_workspace(self, max_query_len: int) -> GraphWorkspace | None:
        """The fixed memory for the plan of a step; None if no graph may replay the step.

        There is one for each tile size, because the sequences of a graph always have as many tokens
        as when it was captured.
        """
        if not self.graphs.has_ours(max_query_len):
            return None
        rows = tile_rows(self.layers, max_query_len)
        if rows not in self._in_graphs:
            shape = self._shape(rows)
            num_tiles = -(-self.graphs.most_query_len * shape.group_size // rows)
            most_units = self.most_requests * num_tiles * shape.num_kv_heads
            self._in_graphs[rows] = GraphWorkspace(
                rows, shape.num_ctas, most_units, self.layers.head_size, self.device
            )
        return self._in_graphs[rows]
