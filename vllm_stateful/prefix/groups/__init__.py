# SPDX-License-Identifier: Apache-2.0
"""What a turn needs of each KV cache group to continue at a position.

A group is one block table of vLLM: layers that keep their KV in the same way. Where every position
can be continued (`full`), nothing more than the blocks up to it is needed. Elsewhere only some
positions can be: those whose last window (`window`) or whose state (`state`) is still held. Such a
position is a resume point (`table.ResumePoint`).
"""

from vllm_stateful.prefix.groups.full import FullGroup
from vllm_stateful.prefix.groups.state import StateGroup
from vllm_stateful.prefix.groups.table import Group, ResumePoint, Table
from vllm_stateful.prefix.groups.window import ChunkGroup, WindowGroup

__all__ = ["ChunkGroup", "FullGroup", "Group", "ResumePoint", "StateGroup", "Table", "WindowGroup"]
