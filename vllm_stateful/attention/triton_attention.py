# SPDX-License-Identifier: Apache-2.0
"""Delta append attention in Triton: for devices without the compiled kernels, and a second oracle.

It uses the same plan as csrc/, with one program per segment. Two further launches sum the parts of
each unit and append the new rows. Shared prefixes are not supported here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_stateful.attention.ops import DevicePlan

MASKED = tl.constexpr(-1.0e30)
BLOCK_KEYS = {64: 64, 128: 64, 256: 32}


@triton.jit
def _read_keys(cache, new, where, columns, strides, shift, PAGE):
    """Read rows of K, or of V `shift` elements behind, from the cache and the new tokens.

    Rows of `old` keys come from the cache, those of `fresh` keys from the new tokens; all others
    are zero.

    strides: those of the cache's blocks, tokens and heads, and of the new keys' tokens and heads.
    """
    head, query0, pages, keys, old, fresh = where
    block, token, of_head, new_token, new_head = strides
    cached = pages.to(tl.int64) * block + (keys % PAGE) * token + head * of_head + shift
    added = (query0 + keys).to(tl.int64) * new_token + head * new_head
    from_cache = tl.load(cache + cached[:, None] + columns[None], mask=old[:, None], other=0.0)
    from_new = tl.load(new + added[:, None] + columns[None], mask=fresh[:, None], other=0.0)
    return tl.where(fresh[:, None], from_new, from_cache)


@triton.jit
def _score(queries, k, keys, itself, ok, settings):
    """The scores times log2(e), and which of them are not masked."""
    scale, soft_cap, window = settings
    scores = tl.dot(queries, tl.trans(k)) * scale
    if soft_cap > 0:
        halves = tl.exp2(-2.0 * 1.4426950408889634 * tl.abs(scores / soft_cap))
        bent = (1.0 - halves) / (1.0 + halves) * soft_cap
        scores = tl.where(scores < 0, -bent, bent)
    seen = ok[None] & (keys[None] <= itself[:, None])
    if window > 0:
        seen = seen & (keys[None] + window > itself[:, None])
    return tl.where(seen, scores * 1.4426950408889634, MASKED), seen


@triton.jit
def _attend_blocks(
    queries,
    step,
    tensors,
    lengths,
    place,
    strides,
    settings,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Attend to a segment's blocks: the weighted sum of values, the sum of weights, the maximum."""
    cache, k_new, v_new, table = tensors
    head, first_key, num_cached_blocks, block0, block1 = place
    query0, num_new, num_cached = lengths
    cache_strides, k_strides, v_strides = strides
    columns = tl.arange(0, D)
    most = tl.full((ROWS,), MASKED, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, D), tl.float32)
    for block in range(block0, block1):
        behind = (block - num_cached_blocks) * KEYS
        first = tl.where(behind >= 0, behind, first_key + block * KEYS)
        keys = first + tl.arange(0, KEYS)
        ok = keys < tl.where(behind >= 0, num_new, num_cached)
        old, fresh = ok & (keys * 0 + behind < 0), ok & (keys * 0 + behind >= 0)
        pages = tl.load(table + keys // PAGE, mask=old, other=0)
        where = (head, query0, pages, keys, old, fresh)
        k = _read_keys(cache, k_new, where, columns, cache_strides + k_strides, 0, PAGE)
        itself = tl.where(behind >= 0, step, num_cached + step)
        scores, seen = _score(queries, k, keys, itself, ok, settings)
        higher = tl.maximum(most, tl.max(scores, 1))
        kept = tl.exp2(most - higher)
        weights = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
        v = _read_keys(cache, v_new, where, columns, cache_strides + v_strides, D, PAGE)
        summed = summed * kept[:, None] + tl.dot(weights.to(v.dtype), v)
        total = total * kept + tl.sum(weights, 1)
        most = higher
    return summed, total, most


@triton.jit
def _attend_segment(
    q,
    tensors,
    results,
    segments,
    units,
    table_stride,
    query_start,
    seq_lens,
    q_strides,
    out_strides,
    strides,
    settings,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    cache, k_new, v_new, block_table = tensors
    out, partial_out, partial_lse = results
    segment = segments + tl.program_id(0) * 8
    unit = units + tl.load(segment) * 8
    sequence, head = tl.load(unit), tl.load(unit + 1)
    query0 = tl.load(query_start + sequence)
    num_new = tl.load(query_start + sequence + 1) - query0
    num_cached = tl.load(seq_lens + sequence) - num_new
    columns, rows = tl.arange(0, D), tl.load(unit + 2) + tl.arange(0, ROWS)
    step = rows // GROUP
    real = step < num_new
    token, query_head = (query0 + step).to(tl.int64), head * GROUP + rows % GROUP
    at = token * q_strides[0] + query_head * q_strides[1]
    queries = tl.load(q + at[:, None] + columns[None], mask=real[:, None], other=0.0)
    table = block_table + sequence.to(tl.int64) * table_stride
    first_key, num_cached_blocks = tl.load(unit + 3), tl.load(unit + 4)
    summed, total, most = _attend_blocks(
        queries,
        step,
        (cache, k_new, v_new, table),
        (query0, num_new, num_cached),
        (head, first_key, num_cached_blocks, tl.load(segment + 2), tl.load(segment + 3)),
        strides,
        settings,
        D,
        PAGE,
        ROWS,
        KEYS,
    )
    result = summed / tl.where(total > 0, total, 1.0)[:, None]
    if tl.load(unit + 5) == 1:
        to = token * out_strides[0] + query_head * out_strides[1]
        value = result.to(out.dtype.element_ty)
        tl.store(out + to[:, None] + columns[None], value, mask=real[:, None])
    else:
        slot = (tl.load(unit + 6) + tl.load(segment + 4)).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        tl.store(partial_out + slot[:, None] * D + columns[None], result, mask=real[:, None])
        lse = tl.where(total > 0, most + tl.log2(tl.where(total > 0, total, 1.0)), MASKED)
        tl.store(partial_lse + slot, lse, mask=real)


@triton.jit
def _sum_parts(
    out,
    partial_out,
    partial_lse,
    units,
    query_start,
    out_token,
    out_head,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    unit = units + tl.program_id(0) * 8
    num_parts = tl.load(unit + 5)
    if num_parts > 1:
        sequence = tl.load(unit)
        query0 = tl.load(query_start + sequence)
        num_new = tl.load(query_start + sequence + 1) - query0
        columns = tl.arange(0, D)
        rows = tl.load(unit + 2) + tl.arange(0, ROWS)
        real = rows // GROUP < num_new
        slot = tl.load(unit + 6).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        most = tl.full((ROWS,), MASKED, tl.float32)
        for part in range(num_parts):
            lse = tl.load(partial_lse + slot + part * ROWS, mask=real, other=MASKED)
            most = tl.maximum(most, lse)
        total = tl.zeros((ROWS,), tl.float32)
        summed = tl.zeros((ROWS, D), tl.float32)
        for part in range(num_parts):
            place = slot + part * ROWS
            lse = tl.load(partial_lse + place, mask=real, other=MASKED)
            weight = tl.where(lse > MASKED, tl.exp2(lse - most), 0.0)
            value = tl.load(
                partial_out + place[:, None] * D + columns[None], mask=real[:, None], other=0.0
            )
            summed += weight[:, None] * value
            total += weight
        head = tl.load(unit + 1) * GROUP + rows % GROUP
        to = (query0 + rows // GROUP).to(tl.int64) * out_token + head * out_head
        result = summed / tl.where(total > 0, total, 1.0)[:, None]
        value = result.to(out.dtype.element_ty)
        tl.store(out + to[:, None] + columns[None], value, mask=real[:, None])


@triton.jit
def _append(
    k_new,
    v_new,
    cache,
    slot_mapping,
    k_token,
    k_head,
    v_token,
    v_head,
    cache_block,
    cache_token,
    cache_head,
    PAGE: tl.constexpr,
    D: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        columns = tl.arange(0, D)
        to = cache + slot // PAGE * cache_block + slot % PAGE * cache_token + head * cache_head
        tl.store(to + columns, tl.load(k_new + token * k_token + head * k_head + columns))
        tl.store(to + D + columns, tl.load(v_new + token * v_token + head * v_head + columns))


def delta_append_attention(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    kv_cache: torch.Tensor,
    out: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_mapping: torch.Tensor,
    plan: DevicePlan,
    scale: float,
    *,
    soft_cap: float = 0.0,
    window: int = 0,
) -> None:
    """Like `ops.delta_append_attention`, in three launches, over a plan made for `BLOCK_KEYS`.

    Raises:
        ValueError: the plan has shared prefixes.
    """
    if len(plan.groups):
        raise ValueError("shared prefixes are not grouped in Triton")
    head_size, num_kv_heads = q.shape[2], k_new.shape[1]
    group, page = q.shape[1] // num_kv_heads, kv_cache.shape[2]
    block, of_head, token, _ = kv_cache.stride()
    _attend_segment[(len(plan.segments),)](
        q,
        (kv_cache, k_new, v_new, block_table),
        (out, plan.partial_out, plan.partial_lse),
        plan.segments,
        plan.units,
        block_table.stride(0),
        query_start,
        seq_lens,
        q.stride()[:2],
        out.stride()[:2],
        ((block, token, of_head), k_new.stride()[:2], v_new.stride()[:2]),
        (scale, soft_cap, window),
        GROUP=group,
        PAGE=page,
        D=head_size,
        ROWS=plan.rows,
        KEYS=BLOCK_KEYS[head_size],
    )
    _sum_parts[(len(plan.units),)](
        out,
        plan.partial_out,
        plan.partial_lse,
        plan.units,
        query_start,
        *out.stride()[:2],
        GROUP=group,
        D=head_size,
        ROWS=plan.rows,
    )
    _append_all(k_new, v_new, kv_cache, slot_mapping)


def _append_all(
    k_new: torch.Tensor, v_new: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    num_tokens, num_kv_heads, head_size = k_new.shape
    block, of_head, token, _ = kv_cache.stride()
    _append[(num_tokens, num_kv_heads)](
        k_new,
        v_new,
        kv_cache,
        slot_mapping,
        *k_new.stride()[:2],
        *v_new.stride()[:2],
        block,
        token,
        of_head,
        PAGE=kv_cache.shape[2],
        D=head_size,
    )
