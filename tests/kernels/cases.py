# SPDX-License-Identifier: Apache-2.0
"""Random steps: ragged batches over a scattered cache, padding, windows, shared prefixes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from emulator import Step

from vllm_stateful.attention.oracle import append_oracle, attention_oracle, dequantize, quantize
from vllm_stateful.attention.plan import Plan, Shape, SharedPrefix, make_plan

MOST_ERROR = 4e-3  # relative, in the Frobenius norm, bfloat16 against float64
BLOCK_KEYS = {64: 64, 128: 64, 256: 32}
WGMMA_BLOCK_KEYS = {64: 128, 128: 128, 256: 64}


@dataclass
class Case:
    """A step, how it is cut, and what must come out."""

    name: str
    step: Step
    plan: Plan
    rows: int
    expected: torch.Tensor
    expected_cache: torch.Tensor

    def failure(self) -> str:
        """What is wrong with what a kernel made of the step; empty: nothing."""
        out = self.step.out.double()
        error = float((out - self.expected).norm() / self.expected.norm())
        if not error <= MOST_ERROR:
            return f"relative error {error:.2e} in {self.name}"
        if not torch.equal(bits(self.step.cache), bits(self.expected_cache)):
            return f"the cache differs in {self.name}"
        return ""


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int8)


def arguments(device: str) -> list[object]:
    """Of the op itself, by the shapes that its schema documents, with nothing to do."""
    half = {"dtype": torch.bfloat16, "device": device}
    ints = {"dtype": torch.int32, "device": device}
    return [
        torch.zeros(3, 8, 128, **half),
        torch.zeros(3, 2, 128, **half),
        torch.zeros(3, 2, 128, **half),
        torch.zeros(4, 2, 16, 256, **half),
        torch.zeros(3, 8, 128, **half),
        torch.zeros(1, 4, **ints),
        torch.zeros(2, **ints),
        torch.zeros(1, **ints),
        torch.zeros(3, dtype=torch.int64, device=device),
        torch.zeros(3, **ints),
        torch.zeros(2, 8, **ints),
        torch.zeros(2, 8, **ints),
        torch.zeros(0, 4, **ints),
        torch.zeros(0, 2, **ints),
        torch.zeros(1, 16, 128, device=device),
        torch.zeros(1, 16, device=device),
        torch.zeros(2, **ints),
        *[torch.zeros(0, device=device) for _ in range(3)],
        16,
        0.1,
        0.0,
        0,
    ]


def random_case(
    seed: int,
    *,
    rows: tuple[int, ...] = (16, 32, 64),
    block_keys: dict[int, int] = BLOCK_KEYS,
    head_sizes: tuple[int, ...] = (64, 64, 128, 128, 256),
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.bfloat16, torch.float16),
    fp8: bool = False,
    shared: bool = False,
    longest: int = 0,
    grid: Callable[..., int] | None = None,
) -> Case:
    """The same one for the same seed.

    Args:
        shared: Some sequences share a prefix in any case.
        longest: Cached keys of some sequences; 0: a few hundred, which the emulator can bear.
        grid: Thread blocks, from dtype, head size, rows and ``fp8=``; where not given, a few.
    """
    random = Random(seed)
    torch.manual_seed(seed)
    head_size = random.choice(head_sizes)
    group_size = random.choice((1, 4, 8, 3))
    num_kv_heads = random.choice((1, 2))
    page = random.choice((16, 32, 64, 48))
    dtype = random.choice(dtypes)
    tile_rows = random.choice(rows)
    num_shared = random.choice((0, 0, 1)) and random.choice((2, 3, 5))
    prefix_keys = random.choice((16, 64, 112)) // page * page
    if shared:
        pages = 1 + prefix_keys // 16 + (random.randrange(longest // 2 // page) if longest else 0)
        num_shared, prefix_keys = num_shared or 3, pages * page
    window = 0 if num_shared and prefix_keys else random.choice((0, 0, 0, 7, 40))
    soft_cap = random.choice((0.0, 0.0, 0.0, 5.0))
    is_wide = max(rows) == 128  # its blocks are large: fewer sequences, longer ones
    num_sequences = max(num_shared, random.choice((1, 1, 2) if is_wide else (1, 2, 4)))
    most_new = max(1, random.choice((1, 4, 24, 70)) // (1 + (group_size > 4)))
    new = [random.randint(1, most_new) for _ in range(num_sequences)]
    long = 400 if is_wide else 150
    cached = [random.choice((0, random.randint(0, long), 64, 16)) for _ in new]
    if is_wide and random.random() < 0.25:  # a ring of blocks goes round
        cached[0] = random.randint(500, 900)
    if longest:
        cached = [random.choice((each, random.randint(each, longest))) for each in cached]
    prefixes = []
    if num_shared and prefix_keys:
        for sequence in range(num_shared):
            cached[sequence] = prefix_keys + random.choice((0, random.randint(0, 60)))
        prefixes = [SharedPrefix(tuple(range(num_shared)), prefix_keys)]
    step = make_step(
        random, dtype, head_size, group_size, num_kv_heads, page, new, cached, prefixes
    )
    step.window, step.soft_cap = window, soft_cap
    shape = Shape(
        num_ctas=grid(dtype, head_size, tile_rows, fp8=fp8)
        if grid
        else random.choice((1, 2, 4) if is_wide else (1, 2, 5, 9)),
        tile_rows=tile_rows,
        block_keys=block_keys[head_size],
        num_kv_heads=num_kv_heads,
        group_size=group_size,
    )
    bound = random.choice((0, 0, 30, 200))  # how much too long the lengths were planned
    plan = make_plan(
        new,
        [a + b + bound for a, b in zip(new, cached, strict=True)],
        shape,
        prefixes=prefixes,
        window=window,
        exact=not bound,
    )
    name = (
        f"seed {seed}: {dtype}, D {head_size}, G {group_size}, {num_kv_heads} KV heads, "
        f"page {page}, rows {tile_rows}, new {new}, cached {cached}, "
        f"prefix {prefix_keys if prefixes else 0}, "
        f"window {window}, cap {soft_cap}, CTAs {shape.num_ctas}, bound {bound}"
    )
    if fp8:
        heads = random.choice((1, num_kv_heads))
        step = to_fp8(step, [torch.rand(heads) * 0.02 + 0.005 for _ in range(3)])
    expected, expected_cache = expected_of(step)
    return Case(name, step, plan, tile_rows, expected, expected_cache)


def expected_of(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """What a step has to give: the result in float64, and the cache behind it."""
    q, k, v, cache = step.q, step.k_new, step.v_new, step.cache
    expected_cache = cache.clone()
    if step.scales is None:
        append_oracle(expected_cache, k, v, step.slot_mapping)
    else:
        q_scale, *kv_scales = step.scales
        k, v = (quantize(each, scale) for each, scale in zip((k, v), kv_scales, strict=True))
        append_oracle(expected_cache, k, v, step.slot_mapping)
        k, v = (dequantize(each, scale) for each, scale in zip((k, v), kv_scales, strict=True))
        heads = q.unflatten(1, (k.shape[1], -1)).transpose(
            1, 2
        )  # [tokens, in a group, KV heads, D]
        q = dequantize(heads, q_scale).transpose(1, 2).flatten(1, 2)
        tokens_first = cache.transpose(1, 2).split(step.head_size, dim=-1)
        both = zip(tokens_first, kv_scales, strict=True)
        cache = torch.cat([dequantize(each, scale) for each, scale in both], dim=-1).transpose(1, 2)
    expected = attention_oracle(
        q,
        k,
        v,
        cache,
        step.block_table,
        step.query_start,
        step.seq_lens,
        step.scale,
        window=step.window,
        soft_cap=step.soft_cap,
    )
    return expected, expected_cache


def to_fp8(step: Step, scales: list[torch.Tensor]) -> Step:
    """The step with queries and cache in fp8, the cache's strides kept; what was NaN still is."""
    q_scale, *kv_scales = scales
    heads = step.q.unflatten(1, (step.k_new.shape[1], -1)).transpose(1, 2)
    q = quantize(heads, q_scale).transpose(1, 2).flatten(1, 2)
    tokens_first = step.cache.transpose(1, 2).split(step.head_size, dim=-1)
    both = zip(tokens_first, kv_scales, strict=True)
    cache = torch.cat([quantize(each, scale) for each, scale in both], dim=-1).transpose(1, 2)
    there = torch.empty_strided(step.cache.shape, step.cache.stride(), dtype=cache.dtype)
    return dataclasses.replace(step, q=q, cache=there.copy_(cache), scales=tuple(scales))


def make_step(
    random: Random,
    dtype: torch.dtype,
    head_size: int,
    group_size: int,
    num_kv_heads: int,
    page: int,
    new: list[int],
    cached: list[int],
    prefixes: list[SharedPrefix],
) -> Step:
    """Tensors as vLLM lays them: q, k and v are views of one projection, pages are scattered.

    What no sequence has in the cache is NaN.
    """
    tokens, heads = sum(new), num_kv_heads * group_size
    joint = torch.randn(tokens, (heads + 2 * num_kv_heads) * head_size).to(dtype)
    widths = [heads * head_size, num_kv_heads * head_size, num_kv_heads * head_size]
    q, k, v = (each.unflatten(1, (-1, head_size)) for each in joint.split(widths, dim=1))
    pages = [-(-(a + b) // page) for a, b in zip(new, cached, strict=True)]
    num_blocks = sum(pages) + 3
    width = 2 * head_size
    if random.random() < 0.5:  # token-major, or head-major
        cache = torch.full((num_blocks, page, num_kv_heads, width), float("nan"), dtype=dtype)
        cache = cache.transpose(1, 2)
    else:
        cache = torch.full((num_blocks, num_kv_heads, page, width), float("nan"), dtype=dtype)
    free = list(range(num_blocks))
    random.shuffle(free)
    table = torch.full((len(new), max(pages) + 2), -1, dtype=torch.int32)
    for sequence, count in enumerate(pages):
        for place in range(count):
            table[sequence, place] = free.pop()
    for prefix in prefixes:
        whole = prefix.num_keys // page
        for sequence in prefix.sequences[1:]:
            table[sequence, :whole] = table[prefix.sequences[0], :whole]
    slots: list[int] = []
    for sequence, (added, old) in enumerate(zip(new, cached, strict=True)):
        keys = torch.arange(old)
        normal = torch.randn(old, num_kv_heads, width)
        cache[table[sequence].long()[keys // page], :, keys % page] = normal.to(dtype)
        for key in range(old, old + added):
            slot = int(table[sequence, key // page]) * page + key % page
            slots.append(-1 if random.random() < 0.1 else slot)
    starts = [0]
    for added in new:
        starts.append(starts[-1] + added)
    return Step(
        q=q,
        k_new=k,
        v_new=v,
        cache=cache,
        block_table=table,
        query_start=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor([a + b for a, b in zip(new, cached, strict=True)]).int(),
        slot_mapping=torch.tensor(slots),
        scale=head_size**-0.5,
    )
