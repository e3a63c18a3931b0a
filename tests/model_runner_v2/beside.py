# SPDX-License-Identifier: Apache-2.0
"""The choice between a head's drafts and looked-up ones, in Triton's interpreter: a script.

    python beside.py NUM_STEPS

Each request says a text; the head is right with a chance of its own. Verdicts are what vLLM's
verification gives: the draft as far as it is right, and one token more.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import lookup
import numpy as np
import on_host  # noqa: F401
import torch
from numpy.random import Generator, default_rng

from vllm_stateful.adapters.worker import lookup_beside, lookup_kernels, lookup_speculator
from vllm_stateful.adapters.worker.lookup_beside import LookupBesideHead, prior_margins

MAX_LEN, MAX_REQS, BLOCK = 400, 4, 64


class Table:
    """Stands for vLLM's table of texts, whose buffers want a GPU's driver."""

    def __init__(self, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.gpu = torch.zeros(size, dtype=dtype, device=device)


class Head:
    """A drafting head that is right with some chance."""

    acceptance_estimator = object()

    def __init__(self, num_drafts: int) -> None:
        self.num_drafts = num_drafts
        self.drafts = torch.zeros(MAX_REQS, num_drafts, dtype=torch.int64)
        self.draft_token_confidence_probs = torch.zeros(MAX_REQS, num_drafts)
        self.observed: list[list[int]] = []

    def propose(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.drafts

    def observe_verification(
        self, rows: torch.Tensor, sampled: torch.Tensor, rejected: torch.Tensor
    ) -> None:
        self.observed = [sampled.tolist(), rejected.tolist()]


class Bench:
    """Requests that say what they are to say, one step after the other."""

    def __init__(self, random: Generator, num_drafts: int) -> None:
        self.random, self.num_drafts = random, num_drafts
        self.state = SimpleNamespace(
            max_num_reqs=MAX_REQS,
            max_model_len=MAX_LEN,
            req_id_to_index={str(row): row for row in range(MAX_REQS)},
            all_token_ids=SimpleNamespace(gpu=torch.zeros(MAX_REQS, MAX_LEN, dtype=torch.int32)),
            total_len=SimpleNamespace(gpu=torch.zeros(MAX_REQS, dtype=torch.int32)),
        )
        self.head = Head(num_drafts)
        config = SimpleNamespace(
            num_speculative_tokens=num_drafts, enable_adaptive_verification=True
        )
        self.ours: Any = LookupBesideHead(
            SimpleNamespace(speculative_config=config), torch.device("cpu"), self.state, self.head
        )
        self.ours.is_on = True
        self.margins = prior_margins(num_drafts).numpy().astype(np.int64)
        self.is_taken = np.zeros(MAX_REQS, bool)
        self.begin()

    def begin(self) -> None:
        """New requests: some repeat themselves, some do not."""
        self.texts = [
            np.resize(self.random.integers(0, 1000, self.random.choice([7, 19, 500])), MAX_LEN + 20)
            for _ in range(MAX_REQS)
        ]
        self.chances = self.random.choice([0.0, 0.3, 0.9], MAX_REQS)
        self.lengths = self.random.integers(1, 60, MAX_REQS)
        self.drafts = np.full((MAX_REQS, self.num_drafts), -1)
        self.before: dict[int, tuple[int, list[int], list[int]]] = {}
        self.ours.begin([str(row) for row in range(MAX_REQS)], None)

    def step(self) -> None:
        """Each request's draft is verified, and all that follows from it is checked."""
        if self.lengths.max() + self.num_drafts + 2 > MAX_LEN:
            self.begin()
        rows = self.random.permutation(MAX_REQS)
        came = [self.verified(row) for row in rows]
        sampled = torch.tensor([len(tokens) for tokens in came], dtype=torch.int32)
        drafted = [int((self.drafts[row] >= 0).sum()) for row in rows]
        rejected = torch.tensor(drafted, dtype=torch.int32) - sampled + 1
        for row, tokens in zip(rows, came, strict=True):
            self.lengths[row] += len(tokens)
            length = self.lengths[row]
            ids = torch.from_numpy(self.texts[row][:length].astype(np.int32))
            self.state.all_token_ids.gpu[row, :length] = ids
            self.state.total_len.gpu[row] = int(length)
            self.weigh(row, tokens)
        head = [self.proposed(row) for row in rows]
        self.head.drafts = torch.tensor(np.array(head))
        states = torch.from_numpy(rows)
        self.head.observe_verification(states, sampled, rejected)
        is_head = np.array([not self.is_taken[row] for row in rows])
        expected = [(sampled.numpy() * is_head).tolist(), (rejected.numpy() * is_head).tolist()]
        assert self.head.observed == expected
        last = torch.zeros(MAX_REQS, 1, dtype=torch.int64)
        batch = SimpleNamespace(num_reqs=len(rows), idx_mapping=states)
        given = (batch, None, None, None, None, sampled, rejected, last)
        most = int(self.random.choice([0, 1, self.num_drafts, self.num_drafts, self.num_drafts]))
        made = self.head.propose(*given, num_speculative_tokens=most)
        if most == 0:  # nothing of this step is verified, and nothing compared
            self.drafts[:] = -1
            self.before.clear()
            return
        np.testing.assert_array_equal(self.ours.margins.numpy(), self.margins)
        for index, row in enumerate(rows):
            self.choose(row, made[index].tolist(), head[index], most)

    def verified(self, row: int) -> list[int]:
        """What comes: the draft as far as it is right, and one token."""
        rest = self.texts[row][self.lengths[row] :]
        right = (self.drafts[row] == rest[: self.num_drafts]).cumprod().sum()
        return [int(token) for token in rest[: right + 1]]

    def proposed(self, row: int) -> list[int]:
        """By the head."""
        rest = self.texts[row][self.lengths[row] :][: self.num_drafts]
        is_right = self.random.random(self.num_drafts) < self.chances[row]
        return [int(token) for token in np.where(is_right, rest, 2000)]

    def weigh(self, row: int, came: list[int]) -> None:
        """As the kernel should."""
        if row in self.before:
            match, found, head = self.before[row]
            self.margins[match] += num_right(found, came) - num_right(head, came)

    def choose(self, row: int, made: list[int], head: list[int], most: int) -> None:
        own = self.texts[row][: self.lengths[row]].tolist()
        found, match = lookup.naive(own, [], self.num_drafts)
        mixed = found + head[len(found) :]
        self.is_taken[row] = bool(match) and self.margins[match] > 0
        assert made == (mixed if self.is_taken[row] else head), (own, match)
        self.drafts[row] = -1
        self.drafts[row, :most] = made[:most]
        self.before.pop(row, None)
        if match:
            self.before[row] = match, mixed[:most], head[:most]


def num_right(draft: list[int], came: list[int]) -> int:
    """Tokens of a draft that came."""
    num = min(len(draft), len(came))
    return int((np.array(draft[:num]) == np.array(came[:num])).cumprod().sum())


def main(num_steps: int) -> None:
    for module in (lookup_kernels, lookup_speculator):
        module.BLOCK = BLOCK
    lookup_speculator.REGION_TOKENS, lookup_speculator.BUFFER_TOKENS = 64, 256
    lookup_beside.FORGET_STEPS = 1 << 30  # halved by hand, else
    lookup_beside.StagedWriteTensor = Table
    random = default_rng(0)
    for num_drafts in (1, 3, 6):
        bench = Bench(random, num_drafts)
        taken = 0
        for _ in range(num_steps):
            bench.step()
            taken += int(bench.is_taken.sum())
        assert 0 < taken < MAX_REQS * num_steps, "both are chosen now and then"
    print("all right")


if __name__ == "__main__":
    main(int(sys.argv[1]))
