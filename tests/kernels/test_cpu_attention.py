# SPDX-License-Identifier: Apache-2.0
"""Attention of short chunks on a CPU, over a cache that vLLM's own kernel wrote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm import _custom_ops as vllm_ops
from vllm.platforms import current_platform

from vllm_stateful.attention import cpu_ops

current_platform.import_kernels()

pytestmark = pytest.mark.skipif(bool(cpu_ops.why_unavailable()), reason=cpu_ops.why_unavailable())

ISAS = ("avx2", "")
"""AVX2 everywhere; and the best that this CPU has."""

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3}


@dataclass
class Step:
    """One step, and its cache."""

    new: list[int]
    cached: list[int]
    group: int = 3
    kv_heads: int = 2
    size: int = 64
    block: int = 32
    dtype: torch.dtype = torch.float32
    window: int = 0
    soft_cap: float = 0.0
    seed: int = 0
    q: torch.Tensor = field(init=False)
    cache: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        tokens = sum(self.new)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(self.dtype)  # noqa: E731
        self.q = 3 * draw(tokens, self.kv_heads * self.group, self.size)
        self.lengths = [c + n for c, n in zip(self.cached, self.new, strict=True)]
        blocks = [-(-length // self.block) for length in self.lengths]
        ids = torch.randperm(sum(blocks) + 3, generator=generator).to(torch.int32)
        self.table = torch.zeros(len(self.new), max(1, *blocks), dtype=torch.int32)
        # What no sequence holds must not be looked at.
        shape = (len(ids), self.kv_heads, self.block, 2 * self.size)
        self.cache = torch.full(shape, float("nan"), dtype=self.dtype)
        self.k, self.v, at = [], [], 0
        for row, (length, count) in enumerate(zip(self.lengths, blocks, strict=True)):
            self.table[row, :count] = ids[at : at + count]
            at += count
            self.k.append(draw(length, self.kv_heads, self.size))
            self.v.append(draw(length, self.kv_heads, self.size))
            self._write(row, length)

    def _write(self, row: int, length: int) -> None:
        if not length:
            return
        places = torch.arange(length)
        slots = self.table[row][places // self.block].long() * self.block + places % self.block
        halves = self.cache.view(*self.cache.shape[:2], 2 * self.block, self.size).chunk(2, dim=2)
        vllm_ops.cpu_attn_reshape_and_cache(self.k[row], self.v[row], *halves, slots, "vec")

    @property
    def starts(self) -> torch.Tensor:
        return torch.tensor([0, *torch.tensor(self.new).cumsum(0)], dtype=torch.int32)

    def ours(self) -> torch.Tensor:
        out = torch.full_like(self.q, float("nan"))
        cpu_ops.chunk_attention(
            self.q,
            self.cache,
            out,
            self.starts,
            torch.tensor(self.lengths, dtype=torch.int32),
            self.table,
            self.size**-0.5,
            soft_cap=self.soft_cap,
            window=self.window,
        )
        return out

    def expected(self) -> torch.Tensor:
        """In float64, key by key."""
        outs = []
        for row, (new, length) in enumerate(zip(self.new, self.lengths, strict=True)):
            first = int(self.starts[row])
            q = self.q[first : first + new].double()
            k, v = (x[row].double().repeat_interleave(self.group, 1) for x in (self.k, self.v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.size**-0.5
            if self.soft_cap:
                scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
            behind = torch.arange(length - new, length)[:, None] - torch.arange(length)
            seen = behind >= 0 if not self.window else (behind >= 0) & (behind < self.window)
            scores = scores.masked_fill(~seen, float("-inf"))
            outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        return torch.cat(outs)

    def check(self) -> None:
        ours, expected = self.ours().double(), self.expected()
        assert ours.isfinite().all()
        allowed = TOLERANCE[self.dtype] * torch.cat([expected.ravel(), torch.ones(1)]).abs().max()
        assert ((ours - expected).abs() <= allowed).all()


@pytest.fixture(params=ISAS, ids=["avx2", "best"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("STATEFUL_CPU_ISA", request.param)
    return str(request.param)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


CASES = {
    "decode": Step([1, 1, 1], [40, 700, 0]),
    "drafts": Step([5, 1, 17], [333, 64, 1000]),
    "long and short": Step([3, 64], [3000, 1]),
    "a sequence without new tokens": Step([2, 0, 3], [100, 50, 31]),
    "nothing cached": Step([40, 7], [0, 0]),
    "nothing at all": Step([0], [0]),
    "one head": Step([6], [500], group=1, kv_heads=1),
    "many heads": Step([9, 2], [130, 260], group=8, kv_heads=4),
    "large heads": Step([4, 4], [257, 90], size=256, group=2),
    "small heads": Step([4], [300], size=32, group=5),
    "odd heads": Step([7], [400], size=96),
    "large blocks": Step([5, 3], [700, 129], block=128),
    "larger blocks": Step([5, 3], [1500, 129], block=512),
    "blocks of 96": Step([5, 3], [700, 95], block=96),
    "a window": Step([5, 1, 40], [500, 300, 100], window=100),
    "a window of one": Step([5], [50], window=1),
    "a wide window": Step([5], [50], window=1000),
    "a soft cap": Step([5, 2], [200, 333], soft_cap=4.0),
    "bfloat16": Step([5, 1], [500, 77], dtype=torch.bfloat16),
    "bfloat16 and all else": Step(
        [9, 30], [600, 10], dtype=torch.bfloat16, window=333, soft_cap=8.0, block=64, group=4
    ),
}


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("name", CASES)
def test_it_attends_as_float64_does(name: str) -> None:
    CASES[name].check()


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Any step that fits."""
    count = draw(st.integers(1, 5))
    several = st.lists(st.integers(0, 40), min_size=count, max_size=count)
    long = st.lists(st.integers(0, 600), min_size=count, max_size=count)
    return Step(
        draw(several),
        draw(long),
        group=draw(st.integers(1, 8)),
        kv_heads=draw(st.integers(1, 4)),
        size=draw(st.sampled_from([32, 64, 96, 128])),
        block=draw(st.sampled_from([32, 64, 96, 128, 256])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        window=draw(st.sampled_from([0, 0, 1, 7, 64, 200])),
        soft_cap=draw(st.sampled_from([0.0, 0.0, 5.0])),
        seed=draw(st.integers(0, 9)),
    )


@given(step=steps(), threads=st.integers(1, 6))
def test_any_step_is_attended_as_float64_does(step: Step, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step.check()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("length", [-5, 0, 10**9])
def test_padding_may_be_of_any_length(length: int) -> None:
    """A sequence without new tokens is not looked at."""
    step, padded = Step([3, 0], [70, 0]), Step([3], [70])
    step.lengths[1] = length
    step.cache, step.table, step.q = padded.cache, padded.table.repeat(2, 1), padded.q
    assert torch.equal(step.ours(), padded.ours())


@pytest.mark.parametrize("window", [0, 5, 64])
def test_windows_are_vllms(window: int) -> None:
    """A sliding window counts a token's own key, in vLLM's kernel as in ours."""
    step = Step([5, 2], [200, 30], window=window)
    lengths = torch.tensor(step.lengths, dtype=torch.int32)
    metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=2,
        num_heads=step.q.size(1),
        num_kv_heads=step.kv_heads,
        head_dim=step.size,
        seq_lens=lengths,
        dtype=step.dtype,
        query_start_loc=step.starts,
        causal=True,
        sliding_window_size=window or -1,
        isa="vec",
        enable_kv_split=True,
        dynamic_causal=None,
        kv_cache_dtype="auto",
    )
    halves = step.cache.view(*step.cache.shape[:2], 2 * step.block, step.size).chunk(2, dim=2)
    theirs = torch.empty_like(step.q)
    vllm_ops.cpu_attention_with_kv_cache(
        query=step.q,
        key_cache=halves[0].nan_to_num(),
        value_cache=halves[1].nan_to_num(),
        output=theirs,
        query_start_loc=step.starts,
        seq_lens=lengths,
        scale=step.size**-0.5,
        causal=True,
        alibi_slopes=None,
        sliding_window=window or -1,
        block_table=step.table,
        softcap=0.0,
        scheduler_metadata=metadata,
        s_aux=None,
        dynamic_causal=None,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    assert torch.allclose(step.ours(), theirs, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 6, 64, dtype=torch.float16)}, "dtype of q"),
        ({"q": torch.zeros(2, 5, 64)}, "multiple of KV heads"),
        ({"q": torch.zeros(2, 6, 40)}, "multiples of 32"),
        ({"q": torch.zeros(2, 6)}, "three dimensions"),
        ({"out": torch.zeros(1, 6, 64)}, "shape of q"),
        ({"seq_lens": torch.tensor([40.0])}, "seq_lens must be"),
        ({"seq_lens": torch.tensor([1], dtype=torch.int32)}, "hold its new tokens"),
        ({"seq_lens": torch.tensor([999], dtype=torch.int32)}, "hold its new tokens"),
        ({"query_start": torch.tensor([0, 3], dtype=torch.int32)}, "must not decrease"),
        ({"query_start": torch.tensor([0, 1, 2], dtype=torch.int32)}, "for each sequence"),
        ({"block_table": torch.zeros(2, dtype=torch.int32)}, "block_table must be"),
    ],
)
def test_what_does_not_fit_is_an_error(change: dict[str, torch.Tensor], message: str) -> None:
    step = Step([2], [38])
    arguments: dict[str, Any] = {
        "q": step.q,
        "kv_cache": step.cache,
        "out": torch.empty_like(step.q),
        "query_start": step.starts,
        "seq_lens": torch.tensor(step.lengths, dtype=torch.int32),
        "block_table": step.table,
        "scale": 1.0,
    }
    with pytest.raises(RuntimeError, match=message):
        cpu_ops.chunk_attention(**(arguments | change))


def test_it_can_be_traced() -> None:
    step = Step([2, 3], [40, 9])
    torch.library.opcheck(
        torch.ops.vllm_stateful_cpu.chunk_attention.default,
        (
            step.q,
            step.cache.nan_to_num(),
            torch.empty_like(step.q),
            step.starts,
            torch.tensor(step.lengths, dtype=torch.int32),
            step.table,
            0.1,
            0.0,
            0,
        ),
    )
