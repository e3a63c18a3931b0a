# SPDX-License-Identifier: Apache-2.0
"""The look-up on the device against a naive one, in Triton's interpreter: a script of its own."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import on_host  # noqa: F401
import torch
from numpy.random import Generator, default_rng

from vllm_stateful.adapters.worker import lookup_kernels, lookup_speculator
from vllm_stateful.adapters.worker.lookup_speculator import LookupSpeculator, prior
from vllm_stateful.speculate.answer_buffer import END, MAX_MATCH, LookupUpdate, Span, Write

MAX_LEN, MAX_REQS, BLOCK, REGION = 96, 5, 16, 40
Texts = dict[int, list[int]]


def matches(text: list[int], place: int, end: list[int]) -> int:
    """How many tokens before a place of a text are the end of another."""
    num = 0
    while num < min(MAX_MATCH, place, len(end)) and text[place - 1 - num] == end[-1 - num]:
        num += 1
    return num


def naive(own: list[int], said: list[int], num: int) -> tuple[list[int], int]:
    """The draft, and the length of the match."""
    places = [(matches(own, place, own), place) for place in range(1, len(own))]
    others = [
        (matches(said, place, own), place) for place in range(1, len(said)) if said[place] != END
    ]
    length, place = max(places, default=(0, 0))
    other, other_place = max(others, default=(0, 0))
    if max(length, other) == 0:
        return [], 0
    if length >= other:
        return [own[place + index % (len(own) - place)] for index in range(num)], length
    rest = said[other_place : other_place + num]
    return (rest[: rest.index(END)] if END in rest else rest), other


def text_of(random: Generator, num_tokens: int) -> list[int]:
    """Now and then one that goes in circles."""
    num = int(random.integers(1, MAX_LEN))
    if random.random() < 0.5:
        return [int(token) for token in random.integers(0, num_tokens, num)]
    start = random.integers(0, 100, random.integers(0, num))
    circle = random.integers(0, 100, random.integers(1, 9))
    return [int(token) for token in np.append(start, np.resize(circle, num - len(start)))]


class Bench:
    """One speculator, and what it should know."""

    def __init__(self, num_drafts: int) -> None:
        self.state = SimpleNamespace(
            max_num_reqs=MAX_REQS,
            max_model_len=MAX_LEN,
            req_id_to_index={},
            all_token_ids=SimpleNamespace(gpu=torch.zeros(MAX_REQS, MAX_LEN, dtype=torch.int32)),
            total_len=SimpleNamespace(gpu=torch.zeros(MAX_REQS, dtype=torch.int32)),
        )
        config = SimpleNamespace(
            num_speculative_tokens=num_drafts, enable_adaptive_verification=True
        )
        self.num_drafts = num_drafts
        self.ours: Any = LookupSpeculator(
            SimpleNamespace(speculative_config=config), torch.device("cpu"), self.state
        )
        self.counts = prior()

    def step(self, random: Generator, before: dict[int, tuple[int, int]]) -> None:
        """Random texts, so that nothing carries over but what was verified of the last drafts."""
        num_tokens = int(random.integers(2, 5))
        rows = random.permutation(MAX_REQS)[: random.integers(1, MAX_REQS + 1)]
        own: Texts = {}
        said: Texts = {}
        writes, spans = [], {}
        for row in rows:
            own[row] = text_of(random, num_tokens)
            said[row] = random.integers(END, num_tokens, random.integers(0, REGION)).tolist()
            start = int(row) * REGION
            writes.append(Write(start, np.array(said[row], np.int32)))
            spans[str(row)] = Span(start, len(said[row]))
            self.state.req_id_to_index[str(row)] = int(row)
            self.state.all_token_ids.gpu[row, : len(own[row])] = torch.tensor(own[row])
            self.state.total_len.gpu[row] = len(own[row])
        fresh = [str(row) for row in rows if random.random() < 0.3]
        self.ours.begin(fresh, LookupUpdate(writes, spans))
        for name in fresh:
            before.pop(int(name), None)
        sampled = random.integers(0, self.num_drafts + 2, len(rows))
        rejected = random.integers(0, self.num_drafts + 2 - np.maximum(sampled, 1))
        last = torch.arange(MAX_REQS) + 900
        drafts = self.ours.propose(
            SimpleNamespace(num_reqs=len(rows), idx_mapping=torch.tensor(rows)),
            None,
            None,
            None,
            None,
            torch.tensor(sampled, dtype=torch.int32),
            torch.tensor(rejected, dtype=torch.int32),
            last.view(-1, 1),
        )
        for index, row in enumerate(rows):
            self.learn(before.get(row), int(sampled[index]), int(rejected[index]))
        np.testing.assert_array_equal(self.ours.counts.numpy(), self.counts.numpy())
        for index, row in enumerate(rows):
            expected, match = naive(own[row], said[row], self.num_drafts)
            if sampled[index] == 0:
                expected, match = [], 0
            filled = expected + [int(last[row])] * (self.num_drafts - len(expected))
            assert drafts[index].tolist() == filled, (own[row], said[row], expected)
            steps = np.minimum(match + np.arange(len(expected)), MAX_MATCH)
            chances = (self.counts[1, steps] / self.counts[0, steps]).tolist()
            chances += [0.0] * (self.num_drafts - len(expected))
            np.testing.assert_allclose(self.ours.draft_token_confidence_probs[index], chances)
            before[row] = (match, len(expected))

    def learn(self, before: tuple[int, int] | None, sampled: int, rejected: int) -> None:
        """As the kernel should: accepted tokens, and the first one that was not."""
        if before is None or sampled == 0:
            return
        match, num = before
        for index in range(min(num, sampled - 1 + rejected)):
            self.counts[0, min(match + index, MAX_MATCH)] += 1
            if index == sampled - 1:
                break
            self.counts[1, min(match + index, MAX_MATCH)] += 1


def main(num_steps: int) -> None:
    lookup_kernels.BLOCK = lookup_speculator.BLOCK = BLOCK
    lookup_speculator.REGION_TOKENS, lookup_speculator.BUFFER_TOKENS = REGION, REGION * MAX_REQS
    random = default_rng(0)
    for num_drafts in (1, 3, 8):
        bench, before = Bench(num_drafts), {}
        for _ in range(num_steps):
            bench.step(random, before)
    print("all right")


if __name__ == "__main__":
    main(int(sys.argv[1]))
