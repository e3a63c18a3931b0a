# SPDX-License-Identifier: Apache-2.0
"""`pinned_ids` for vLLM's model runner V2, the one of CUDA: with async scheduling, drafts or not.

    vllm serve ... --worker-extension-cls benchmarks.serving.pinned_ids_v2.PinnedIds

Requests say the same field. The ids lie on the device, and which of them a row of logits has to
become follows from the row's position there, so nothing waits for the host. vLLM samples and
verifies drafts outside of its CUDA graphs. Its own `--enable-trace-replay` refuses drafts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

FIELD = "pinned_ids"
MOST_IDS = 1024
NONE = -1


class PinnedIds:
    """Adds nothing to the worker: importing this module is what pins (model runner V2)."""


class Pins:
    """The ids of all requests, a row each; `NONE` where nothing is pinned.

    Args:
        states: The runner's table of requests.
    """

    def __init__(self, states: Any) -> None:
        self._states = states
        size = (states.max_num_reqs, MOST_IDS)
        self._ids = StagedWriteTensor(size, dtype=torch.int32, device=states.device)
        self._ids.gpu.fill_(NONE)
        self._is_pinned = np.zeros(states.max_num_reqs, dtype=bool)

    def add(self, row: int, params: Any) -> None:
        """A request has taken a row.

        Raises:
            ValueError: more ids than a row has.
        """
        pinned = (params.extra_args or {}).get(FIELD) or []
        if len(pinned) > MOST_IDS:
            raise ValueError(f"{len(pinned)} pinned ids, at most {MOST_IDS}")
        if pinned or self._is_pinned[row]:
            self._ids.stage_write(row, 0, [*pinned, *[NONE] * (MOST_IDS - len(pinned))])
        self._is_pinned[row] = bool(pinned)

    def apply_staged_writes(self) -> None:
        """Bring new rows to the device."""
        self._ids.apply_write()

    def pin(self, logits: torch.Tensor, batch: Any) -> None:
        """Leave one token in each row of the requests that are pinned, in place.

        Args:
            logits: shape ``[num_rows, vocab_size]``; a row for each drafted token and one more.
            batch: vLLM's, whose rows these are.
        """
        if not self._is_pinned[batch.idx_mapping_np].any():
            return
        rows = batch.expanded_idx_mapping.long()
        made = batch.positions[batch.logits_indices] + 1 - self._states.prompt_len.gpu[rows]
        tokens = self._ids.gpu[rows, made.clamp(0, MOST_IDS - 1).long()].long()
        is_pinned = (made >= 0) & (made < MOST_IDS) & (tokens != NONE)
        column = tokens.clamp(min=0).unsqueeze(1)
        kept = logits.gather(1, column).masked_fill(is_pinned.unsqueeze(1), 0.0)
        logits.masked_fill_(is_pinned.unsqueeze(1), float("-inf"))
        logits.scatter_(1, column, kept)


def _pins(sampler: Any) -> Pins:
    """Those of a sampler, made when they are first asked for."""
    if not hasattr(sampler, "pinned_ids"):
        sampler.pinned_ids = Pins(sampler.req_states)
    found: Pins = sampler.pinned_ids
    return found


def _wrap(owner: type, name: str, before: Callable[..., None]) -> None:
    """Have something done before a method."""
    stock = getattr(owner, name)

    @functools.wraps(stock)
    def wrapped(self: Any, *args: Any, **named: Any) -> Any:
        before(self, *args)
        return stock(self, *args, **named)

    setattr(owner, name, wrapped)


_wrap(Sampler, "add_request", lambda self, row, params: _pins(self).add(row, params))
_wrap(Sampler, "apply_staged_writes", lambda self: _pins(self).apply_staged_writes())
_wrap(Sampler, "__call__", lambda self, logits, batch: _pins(self).pin(logits, batch))
_wrap(
    RejectionSampler,
    "__call__",
    lambda self, logits, batch, *_: _pins(self.sampler).pin(logits, batch),
)
