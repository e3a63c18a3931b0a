# SPDX-License-Identifier: Apache-2.0
"""What the plan of a step, and finding who shares a prefix, take of the host; no GPU is needed.

    python -m benchmarks.kernels.bench_host

Plans: steps that verify three drafts behind 5,000 to 60,000 tokens, 8 KV heads, of which each step
keeps 1 to 5 tokens. Sharing: requests of 6,000 blocks of 16 tokens, as the scheduler has them.
"""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.demo import machine
from vllm_stateful.adapters.engine.shared_prefixes import SchedulerPrefixes
from vllm_stateful.attention import ops
from vllm_stateful.attention.choice import Graphs, Layers
from vllm_stateful.attention.plan import SharedPrefix
from vllm_stateful.attention.step_plans import StepPlans

LLAMA = Layers(head_size=128, group_size=4, page_size=16, is_half_precision=True, capability=(9, 0))
NUM_CTAS, KV_HEADS, NEW, STEPS = 264, 8, 4, 600
REQUESTS, BLOCKS, BLOCK, SHARED = 64, 6000, 16, 4000


def plans(num_sequences: int, num_shared: int) -> str:
    """One line of the table; with so many keys that all sequences share."""
    made = StepPlans(LLAMA, Graphs(), KV_HEADS, torch.bfloat16, 64, torch.device("cpu"))
    random = np.random.default_rng(0)
    times: tuple[list[float], list[float]] = ([], [])
    shared = [SharedPrefix(tuple(range(num_sequences)), num_shared)] if num_shared else []
    new = np.full(num_sequences, NEW, np.int32)
    cached = random.integers(5_000, 60_000, num_sequences).astype(np.int32)
    for _ in range(STEPS):
        before, began = made.num_made, time.perf_counter()
        made.of(new, cached + new, NEW, shared)
        times[made.num_made > before].append(time.perf_counter() - began)
        cached += random.integers(1, 6, num_sequences).astype(np.int32)
    kept, planned = (1e3 * statistics.median(each) if each else float("nan") for each in times)
    figures = f"{planned:.2f} | {kept:.2f} | {made.num_made} of {STEPS}"
    return f"| {num_sequences} | {num_shared} | {figures} |"


class Requests:
    """Requests that decode, all with the same first blocks or each with its own."""

    def __init__(self, num_shared: int) -> None:
        self.num_shared = num_shared
        self.blocks: dict[str, list[Any]] = {}
        group = SimpleNamespace(req_to_blocks=self.blocks, block_size=BLOCK)
        manager: Any = SimpleNamespace(coordinator=SimpleNamespace(single_type_managers=[group]))
        self.prefixes = SchedulerPrefixes(manager)
        self.requests: dict[str, Any] = {}
        self.num_added = 0

    def add(self) -> str:
        name, number = f"request {self.num_added}", self.num_added
        self.num_added += 1
        first = range(self.num_shared)
        own = range((number + 1) * BLOCKS, (number + 2) * BLOCKS - self.num_shared)
        self.blocks[name] = [SimpleNamespace(block_id=each) for each in (*first, *own)]
        tokens = BLOCKS * BLOCK
        request = SimpleNamespace(num_prompt_tokens=tokens, num_computed_tokens=tokens + 1)
        self.requests[name] = request
        return name

    def step(self, *new: str) -> float:
        """Milliseconds of a step in which these came."""
        output: Any = SimpleNamespace(
            scheduled_new_reqs=[SimpleNamespace(req_id=name) for name in new],
            scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
            num_scheduled_tokens=dict.fromkeys(self.requests, 1),
        )
        began = time.perf_counter()
        self.prefixes.step_begins(output, self.requests)
        return 1e3 * (time.perf_counter() - began)


def sharing(num_shared: int) -> str:
    """One line of the table."""
    played = Requests(num_shared)
    played.step(*[played.add() for _ in range(REQUESTS)])
    still = statistics.median(played.step() for _ in range(200))
    changes = []
    for _ in range(20):
        gone = next(iter(played.requests))
        del played.requests[gone], played.blocks[gone]
        changes.append(played.step(played.add()))
    return f"| {num_shared} | {still:.3f} | {statistics.median(changes):.2f} | {max(changes):.2f} |"


def main() -> None:
    """Print both tables."""
    ops.num_ctas = lambda *_, **__: NUM_CTAS
    print(machine.describe())
    print(
        "\n| sequences | shared keys | a plan made (ms) | kept (ms) | made |\n|---|---|---|---|---|"
    )
    for num_sequences, num_shared in ((1, 0), (8, 0), (64, 0), (8, 4096), (64, 4096)):
        print(plans(num_sequences, num_shared))
    print("\n| shared blocks | nothing changes (ms) | one goes, one comes (ms) | most |")
    print("|---|---|---|---|")
    for num_shared in (SHARED, 0):
        print(sharing(num_shared))


if __name__ == "__main__":
    main()
