# SPDX-License-Identifier: Apache-2.0
"""The steps that are measured, and the least time that a device could take for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from random import Random

import torch

HEADS, KV_HEADS, HEAD_SIZE, PAGE = 32, 8, 128, 16
SCALE = HEAD_SIZE**-0.5
H200_BYTES_S = 4.3e12
H200_FLOP_S = 790e12


@dataclass(frozen=True)
class Regime:
    """One row of the table.

    Attributes:
        new: Tokens of each sequence.
        cached: Of each sequence.
        num_shared: Leading keys that all sequences have in common.
        fp8: The cache and the queries are fp8 (e4m3), with scales of one.
    """

    name: str
    new: tuple[int, ...]
    cached: tuple[int, ...]
    num_shared: int = 0
    fp8: bool = False

    def floor_s(self) -> float:
        """KV read once, q, out and new KV moved once, or the products at full rate."""
        tokens = sum(self.new)
        distinct = sum(self.cached) - self.num_shared * (len(self.cached) - 1)
        cached = 2 * KV_HEADS * (distinct + tokens) + HEADS * tokens  # read, written, and q
        given = 2 * KV_HEADS * tokens + HEADS * tokens  # new K and V, and the result
        moved = HEAD_SIZE * ((1 if self.fp8 else 2) * cached + 2 * given)
        pairs = sum(a * (b + (a + 1) / 2) for a, b in zip(self.new, self.cached, strict=True))
        return max(moved / H200_BYTES_S, 4 * HEADS * HEAD_SIZE * pairs / H200_FLOP_S)


def _alike(batch: int, new: int, cached: int, **options: bool) -> Regime:
    """Sequences of one length."""
    kind = ", fp8" if options.get("fp8") else ""
    name = f"{batch} x {new} new, {cached // 1024}k cached{kind}"
    return Regime(name, (new,) * batch, (cached,) * batch, **options)


def _sharing(agents: int, new: int, shared: int, own: int = 1024) -> Regime:
    """Sequences with one beginning."""
    length = f"{shared // 1024}k" if shared >= 1024 else str(shared)
    name = f"{agents} agents x {new}, {length} shared"
    return Regime(name, (new,) * agents, (shared + own,) * agents, shared)


def of_agents() -> list[Regime]:
    """What agents do, most common first: a turn, turns at once, decode, drafts, sub-agents."""
    return [
        _alike(1, 700, 102400),
        _alike(8, 200, 32768),
        _alike(64, 1, 8192),
        _alike(8, 6, 32768),
        _sharing(8, 16, 6144),
        _sharing(8, 16, 32768),
    ]


def of_goals() -> list[Regime]:
    """Those of the goals: latency, memory, crossover, compute, ragged, shared, fp8."""
    made = [
        _alike(1, 16, 32768),
        _alike(1, 16, 4096),
        _alike(8, 16, 32768),
        _alike(8, 64, 32768),
        _alike(8, 512, 32768),
        _alike(1, 256, 32768),
        _alike(1, 1, 4096),
        _alike(1, 64, 4096),
        _alike(1, 16, 131072),
        _alike(8, 32, 32768),
        _alike(8, 256, 32768),
    ]
    random = Random(0)
    ragged = tuple(random.choice((1024, 4096, 16384, 65536, 131072)) for _ in range(31))
    few = tuple(random.randint(1, 16) for _ in range(31))
    made.append(Regime("ragged: 1 x 512 and 31 x 1 to 16", (512, *few), (16384, *ragged)))
    made.append(_sharing(8, 1, 32768))
    made += [_alike(batch, new, 32768, fp8=True) for batch, new in ((1, 16), (8, 2), (8, 16))]
    return made


def of_sweeps() -> list[tuple[Regime, list[str]]]:
    """What is compared to tune the choice of tiles, the plan, groups and the sum over parts."""
    tiles = ["mma 16", "mma 32", "mma 64", "wgmma"]
    made = [(_alike(8, new, 32768), tiles) for new in (4, 8, 12, 16, 24, 32, 48, 128)]
    made += [(_alike(1, new, 102400), tiles) for new in (4, 16, 32, 128)]
    cuts = [
        f"mma 64, {name}" for name in ("overhead 0", "overhead 2", "least_cost 1", "least_cost 8")
    ]
    sums = ["mma 64", "mma 64 with fan16", "mma 64 with fan64", "mma 64, num_ctas 132"]
    made += [(_alike(1, 16, cached), [*sums, *cuts]) for cached in (4096, 32768)]
    pairs = ["mma 32", "mma 64, grouped", "wgmma", "wgmma, grouped"]
    made += [(_sharing(8, 4, shared), pairs) for shared in (128, 256, 512, 2048)]
    made += [(_sharing(8, new, 8192), pairs) for new in (1, 2, 8, 12)]
    return made


def of_a_cpu() -> list[Regime]:
    """Small enough to try the benchmark itself."""
    return [_alike(1, 16, 1024), _alike(1, 3, 2048)]


def all_regimes() -> list[Regime]:
    """Every one that has a name."""
    return [*of_agents(), *of_goals(), *(regime for regime, _ in of_sweeps()), *of_a_cpu()]


@dataclass
class Tensors:
    """One layer's tensors, as vLLM lays them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cache: torch.Tensor
    out: torch.Tensor
    block_table: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: torch.Tensor


def make(regime: Regime, seed: int, device: str = "cuda") -> Tensors:
    """Random tensors over scattered pages; what is shared is the same pages."""
    random = torch.Generator(device=device).manual_seed(seed)
    normal = partial(torch.randn, generator=random, device=device, dtype=torch.bfloat16)
    tokens, width = sum(regime.new), (HEADS + 2 * KV_HEADS) * HEAD_SIZE
    widths = [HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE]
    joint = normal(tokens, width).split(widths, dim=1)
    q, k, v = (each.unflatten(1, (-1, HEAD_SIZE)) for each in joint)
    pages = [-(-(a + b) // PAGE) for a, b in zip(regime.new, regime.cached, strict=True)]
    shared = regime.num_shared // PAGE
    num_blocks = shared + sum(count - shared for count in pages)
    order = torch.randperm(num_blocks, generator=random, device=device).int()
    table = torch.zeros(len(pages), max(pages), dtype=torch.int32, device=device)
    slots, at = [], shared
    for row, (new, cached, count) in enumerate(zip(regime.new, regime.cached, pages, strict=True)):
        table[row, :shared] = order[:shared]
        table[row, shared:count] = order[at : at + count - shared]
        at += count - shared
        keys = torch.arange(cached, cached + new, device=device)
        slots.append(table[row][keys // PAGE].long() * PAGE + keys % PAGE)
    starts = torch.tensor([0, *regime.new], device=device).cumsum(0).int()
    lengths = torch.tensor(regime.new, device=device) + torch.tensor(regime.cached, device=device)
    cache = normal(num_blocks, KV_HEADS, PAGE, 2 * HEAD_SIZE)
    if regime.fp8:
        q, cache = q.to(torch.float8_e4m3fn), cache.to(torch.float8_e4m3fn)
    return Tensors(
        q=q,
        k=k,
        v=v,
        cache=cache,
        out=torch.empty(tokens, HEADS, HEAD_SIZE, dtype=torch.bfloat16, device=device),
        block_table=table,
        query_start=starts,
        seq_lens=lengths.int(),
        slot_mapping=torch.cat(slots),
    )
