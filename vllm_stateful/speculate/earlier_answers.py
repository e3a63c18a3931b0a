# SPDX-License-Identifier: Apache-2.0
"""What the same agent answered before, in any of its sessions: the richest source of drafts.

Sessions with the same system message and tools call the same tools in the same words. Tenants never
share answers: the tenant is part of the agent's key.

Source: the global tree of SuffixDecoding (arXiv:2411.04975), here for each agent.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np

from vllm_stateful.speculate.answer_buffer import LEAD_TOKENS
from vllm_stateful.speculate.lookup_index import LookupIndex
from vllm_stateful.types import TokenArray

MAX_TOKENS = 1 << 20
"""Tokens kept of one agent's answers. When there are more, the older half is forgotten."""


class EarlierAnswers:
    """The answers of all agents. Not thread-safe.

    Args:
        max_bytes: memory of all indexes together. The agent that was used longest ago goes first.
        max_tokens: tokens kept of one agent's answers.
    """

    def __init__(self, max_bytes: int, max_tokens: int = MAX_TOKENS) -> None:
        self._max_bytes = max_bytes
        self._max_tokens = max_tokens
        self._agents: OrderedDict[Hashable, LookupIndex] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._agents)

    def of(self, agent: Hashable) -> LookupIndex | None:
        """The answers of an agent; None when there are none."""
        index = self._agents.get(agent)
        if index is not None:
            self._agents.move_to_end(agent)
        return index

    def add(self, agent: Hashable, prompt: TokenArray, answer: TokenArray) -> None:
        """Add an answer. O(len(answer)), amortized.

        Args:
            agent: its tenant, LoRA adapter, system message and tools.
            prompt: the prompt of the answer. Its last tokens are kept with the answer.
            answer: the tokens of the answer, shape ``[num_tokens]``.
        """
        index = self._agents.pop(agent, None)
        self.num_bytes -= 0 if index is None else index.num_bytes
        new = np.concatenate([prompt[-LEAD_TOKENS:], answer])[-self._max_tokens :]
        if index is None or len(index) + len(new) > self._max_tokens:
            kept = (
                np.empty(0, np.int32) if index is None else index.tokens[-self._max_tokens // 2 :]
            )
            room = self._max_tokens - len(new)
            index = LookupIndex()
            index.extend(kept[max(0, len(kept) - room) :])
        index.extend(new)
        self._agents[agent] = index
        self.num_bytes += index.num_bytes
        while self.num_bytes > self._max_bytes and self._agents:
            _, forgotten = self._agents.popitem(last=False)
            self.num_bytes -= forgotten.num_bytes
