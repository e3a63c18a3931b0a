# SPDX-License-Identifier: Apache-2.0
"""Full attention and MLA: each token attends to all before it, so all blocks are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_stateful.prefix.groups.table import Group


@dataclass(frozen=True)
class FullGroup(Group):
    """Every position can be continued."""

    is_full: ClassVar[bool] = True

    def first(self, position: int) -> int:
        """All blocks are needed, whatever the position."""
        return 0
