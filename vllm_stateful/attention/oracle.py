# SPDX-License-Identifier: Apache-2.0
"""Delta append attention in float64: a slow oracle that every kernel is tested against."""

from __future__ import annotations

import itertools

import torch

FP8 = torch.float8_e4m3fn


def quantize(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Divide by the scale and round to fp8 (e4m3), as vLLM does when it writes to its cache.

    Args:
        tensor: ``[..., KV heads, D]``.
        scale: The value of one fp8 unit: float32, a single one or ``[KV heads]``.
    """
    most = torch.finfo(FP8).max
    return (tensor.float() / scale.reshape(-1, 1)).clamp(-most, most).to(FP8)


def dequantize(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The values of a quantized tensor, in float64."""
    return tensor.float().double() * scale.double().reshape(-1, 1)


def append_oracle(
    cache: torch.Tensor, k_new: torch.Tensor, v_new: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write new K and V to their slots, in place.

    Args:
        cache: ``[blocks, KV heads, page, 2 D]``: K, then V.
        k_new: ``[tokens, KV heads, D]``.
        v_new: ``[tokens, KV heads, D]``.
        slot_mapping: ``[tokens]``: the slot of each token; -1: not written.
    """
    page, head_size = cache.shape[2], k_new.shape[2]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            cache[slot // page, :, slot % page, :head_size] = k_new[token]
            cache[slot // page, :, slot % page, head_size:] = v_new[token]


def attention_oracle(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Causal attention of new tokens to the cached tokens and to themselves.

    Args:
        q: ``[tokens, heads, D]``.
        k_new: ``[tokens, KV heads, D]``.
        v_new: ``[tokens, KV heads, D]``.
        cache: The cache before the append. Keys behind a sequence's cached ones are not read.
        block_table: ``[sequences, pages]``.
        query_start: ``[sequences + 1]``: the first new token of each sequence, and the end.
        seq_lens: ``[sequences]``: cached and new tokens of each sequence.
        scale: The factor of the scores.
        window: Keys that a token sees, its own included; 0: all.
        soft_cap: Scores become ``cap * tanh(score / cap)``; 0: no cap.

    Returns:
        ``[tokens, heads, D]`` in float64.
    """
    num_heads, head_size = q.shape[1], q.shape[2]
    group_size, page = num_heads // k_new.shape[1], cache.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    starts = query_start.tolist()
    for sequence, (begin, end) in enumerate(itertools.pairwise(starts)):
        if begin == end:
            continue
        num_cached = int(seq_lens[sequence]) - (end - begin)
        places = torch.arange(num_cached, device=q.device)
        blocks = block_table[sequence].long()[places // page]
        self_key = torch.arange(num_cached, num_cached + end - begin, device=q.device)[:, None]
        key = torch.arange(num_cached + end - begin, device=q.device)[None]
        hidden = key > self_key
        if window:
            hidden |= key + window <= self_key
        for head in range(k_new.shape[1]):  # one at a time, as scores take much memory
            old = cache[blocks, head, places % page].double()  # [cached, 2 D]
            k = torch.cat([old[:, :head_size], k_new[begin:end, head].double()])
            v = torch.cat([old[:, head_size:], v_new[begin:end, head].double()])
            heads = slice(head * group_size, (head + 1) * group_size)
            scores = torch.einsum("qhd,kd->hqk", q[begin:end, heads].double(), k) * scale
            if soft_cap:
                scores = torch.tanh(scores / soft_cap) * soft_cap
            scores = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
            out[begin:end, heads] = torch.einsum("hqk,kd->qhd", scores, v)
    return out
