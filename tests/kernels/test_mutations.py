# SPDX-License-Identifier: Apache-2.0
"""Mistakes put into the kernels on purpose: the emulator has to notice each.

A few are tried each time; all of them:

    STATEFUL_MUTATIONS=all pytest tests/kernels/test_mutations.py
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from emulator import CSRC, FEW, WATCHED, build, cuda_headers
from random_steps import WRONG, play, sanitizer

pytestmark = pytest.mark.skipif(cuda_headers() is None, reason="the CUDA headers are not here")
CASES = 200


@dataclass(frozen=True)
class Mutation:
    """One place of one file, and what is written there instead."""

    name: str
    kernel: str
    file: str
    before: str
    after: str
    often: bool = False  # tried each time
    watched: bool = False  # no number shows it, the address sanitizer does


MMA, WGMMA = "delta_append_mma.cuh", "delta_append_wgmma.cuh"
PARTS, HOPPER = "parts.cuh", "hopper.cuh"
OPERANDS, QUANTIZED = "mma_operands.cuh", "quantized.cuh"
MUTATIONS = [
    Mutation("a row does not see itself", "mma", "softmax.cuh", "key <= self;", "key < self;"),
    Mutation(
        "keys behind the end are seen",
        "mma",
        "softmax.cuh",
        "bool seen = column < b.num_valid && key <= self;",
        "bool seen = key <= self;",
    ),
    Mutation(
        "the window is one key too long",
        "mma",
        "softmax.cuh",
        "key + p.window > self",
        "key + p.window >= self",
    ),
    Mutation(
        "what was added up keeps its scale",
        "mma",
        "softmax.cuh",
        "kept[h] = exp2_fast(most[h] - base);",
        "kept[h] = 1.f;",
    ),
    Mutation("no wait for a copy", "mma", MMA, "copy_wait<S::kStages - 2>();", "", often=True),
    Mutation(
        "no barrier in front of a block",
        "mma",
        MMA,
        "__syncthreads();  // the block is there, and all are done with the one before",
        "",
    ),
    Mutation(
        "sums laid over blocks in use",
        "mma",
        MMA,
        "  copy_wait<0>();\n  __syncthreads();\n}",
        "  copy_wait<0>();\n}",
    ),
    Mutation(
        "the wrong chunk of a row",
        "mma",
        OPERANDS,
        "values, row, c + (lane >> 4))",
        "values, row, c + (lane >> 4 ^ 1))",
    ),
    Mutation(
        "a part lies on another",
        "mma",
        "tile.cuh",
        "unit.slot) + tile.segment.part)",
        "unit.slot))",
    ),
    Mutation(
        "a part behind the last is looked at",
        "mma",
        PARTS,
        "k < num_children && row < num_rows\n",
        "k <= num_children && row < num_rows\n",
        watched=True,
    ),
    Mutation("counters stay counted", "mma", PARTS, "if (last) *counter = 0;", ";"),
    Mutation(
        "two nodes have one counter",
        "mma",
        PARTS,
        "node.first_part() + node.stride",
        "node.first_part()",
    ),
    Mutation(
        "a part is counted before it is written",
        "mma",
        PARTS,
        "  sync();\n  for (int i = thread; i < tile.num_members",
        "  for (int i = thread; i < tile.num_members",
    ),
    Mutation(
        "a part is counted before other SMs can see it",
        "mma",
        PARTS,
        "  fence_release();\n",
        "",
        often=True,
    ),
    Mutation("parts of before are summed", "mma", PARTS, "  fence_acquire();\n", "", often=True),
    Mutation(
        "not all know who was last",
        "mma",
        PARTS,
        "  sync();\n  for (int i = 0; i < tile.num_members; ++i) {",
        "  for (int i = 0; i < tile.num_members; ++i) {",
    ),
    Mutation(
        "what a part weighs is overwritten before all have read it",
        "mma",
        PARTS,
        "  sync();  // all have read what is written now\n",
        "",
    ),
    Mutation(
        "a sum is counted before it is written",
        "mma",
        PARTS,
        "      node = node.above();\n      sync();\n",
        "      node = node.above();\n",
    ),
    Mutation(
        "not all know who was last to a node",
        "mma",
        PARTS,
        "arrive(p, unit, node);\n      sync();\n",
        "arrive(p, unit, node);\n",
    ),
    Mutation(
        "the children of a node are taken for parts",
        "mma",
        PARTS,
        "static_cast<int64_t>(node.stride) * kRows;",
        "static_cast<int64_t>(1) * kRows;",
    ),
    Mutation(
        "a block that ends early counts as full",
        "mma",
        "softmax.cuh",
        "b.is_full = b.first + kKeys <= end;",
        "b.is_full = b.first < end;",
    ),
    Mutation(
        "the last new token is not appended",
        "mma",
        "tile.cuh",
        "const int end = (end_row + group - 1) / group;",
        "const int end = end_row / group - (group == 1);",
    ),
    Mutation(
        "appended by the first part",
        "mma",
        "tile.cuh",
        "if (!tile.segment.last) return;",
        "if (tile.segment.part) return;",
    ),
    Mutation(
        "new keys are rounded by the scale of values",
        "fp8",
        OPERANDS,
        "store_rounded(key_to, new_k, p.k_scale[head * p.k_scale_head]);",
        "store_rounded(key_to, new_k, p.v_scale[head * p.v_scale_head]);",
    ),
    Mutation(
        "a quad's columns of a query are not those of its keys",
        "fp8",
        OPERANDS,
        "row, 2 * chunk)) = low;",
        "row, 2 * chunk)) = high;",
    ),
    Mutation(
        "even and odd columns of a value are mixed",
        "fp8",
        OPERANDS,
        "expand(by_parity(b[2 * i + 1]), even[1], odd[1]);",
        "expand(b[2 * i + 1], even[1], odd[1]);",
        often=True,
    ),
    Mutation(
        "even and odd columns of the result change places",
        "fp8",
        MMA,
        "make_float4(state.out[i][2 * h], state.out[i + 1][2 * h], state.out[i][2 * h + 1],",
        "make_float4(state.out[i + 1][2 * h], state.out[i][2 * h], state.out[i][2 * h + 1],",
    ),
    Mutation(
        "all heads have the first one's scale",
        "fp8",
        QUANTIZED,
        "p.k_scale[head * p.k_scale_head];",
        "p.k_scale[0];",
    ),
    Mutation(
        "values are not scaled",
        "fp8",
        QUANTIZED,
        "return p.v_scale[head * p.v_scale_head];",
        "return 1.f;",
    ),
    Mutation(
        "what is too large becomes NaN",
        "fp8",
        QUANTIZED,
        "__NV_SATFINITE",
        "__NV_NOSAT",
    ),
    Mutation(
        "no wait for values",
        "wgmma",
        WGMMA,
        "    barrier_wait(&shared.values_full[ring.stage], ring.phase);\n    clear_tail",
        "    clear_tail",
        often=True,
    ),
    Mutation(
        "keys are freed before they are read",
        "wgmma",
        WGMMA,
        "  wgmma_wait<0>();\n  hold(state.scores);\n  if (lane == 0) "
        "barrier_arrive(&shared.keys_free[ring.stage]);",
        "  if (lane == 0) barrier_arrive(&shared.keys_free[ring.stage]);\n"
        "  wgmma_wait<0>();\n  hold(state.scores);",
    ),
    Mutation(
        "values are freed before they are read",
        "wgmma",
        WGMMA,
        "    wgmma_wait<0>();\n    hold(state.out);\n    if (lane == 0) "
        "barrier_arrive(&shared.values_free[ring.stage]);",
        "    if (lane == 0) barrier_arrive(&shared.values_free[ring.stage]);\n"
        "    wgmma_wait<0>();\n    hold(state.out);",
    ),
    Mutation(
        "scores are read too early",
        "wgmma",
        WGMMA,
        "    wgmma_wait<1>();\n    hold(state.scores);",
        "    hold(state.scores);",
    ),
    Mutation(
        "a key block in use is overwritten",
        "wgmma",
        WGMMA,
        "      barrier_wait(&shared.keys_free[ring.stage], ring.phase ^ 1);\n",
        "",
    ),
    Mutation(
        "a tail is cleared in front of a block",
        "wgmma",
        "softmax.cuh",
        "  if (b.num_valid < 0) b.num_valid = 0;  // planned too long\n",
        "",
    ),
    Mutation(
        "what stands behind the end is multiplied",
        "wgmma",
        WGMMA,
        "if (b.is_full ||",
        "if (b.num_valid >= 0 ||",
    ),
    Mutation(
        "queries are read before all are there",
        "wgmma",
        WGMMA,
        "    store_for_async(line + (((chunk & 7) ^ (row & 7)) << 4), value);\n  }\n"
        "  fence_shared_async();\n  named_barrier(kOneConsumer + consumer, kWarpgroup);",
        "    store_for_async(line + (((chunk & 7) ^ (row & 7)) << 4), value);\n  }\n"
        "  fence_shared_async();",
    ),
    Mutation(
        "wgmma does not see the queries",
        "wgmma",
        WGMMA,
        "    store_for_async(line + (((chunk & 7) ^ (row & 7)) << 4), value);\n  }\n"
        "  fence_shared_async();\n",
        "    store_for_async(line + (((chunk & 7) ^ (row & 7)) << 4), value);\n  }\n",
        often=True,
    ),
    Mutation(
        "wgmma does not see what was cleared",
        "wgmma",
        WGMMA,
        "                    make_uint4(0, 0, 0, 0));\n  }\n  fence_shared_async();\n",
        "                    make_uint4(0, 0, 0, 0));\n  }\n",
    ),
    Mutation("copies do not see the barriers", "wgmma", WGMMA, "    barrier_fence();\n", ""),
    Mutation(
        "parts of kernel B are counted before other SMs can see them",
        "wgmma",
        PARTS,
        "  fence_release();\n",
        "",
    ),
    Mutation(
        "queries are not swizzled",
        "wgmma",
        WGMMA,
        "(((chunk & 7) ^ (row & 7)) << 4)",
        "((chunk & 7) << 4)",
    ),
    Mutation(
        "the strides of a descriptor change places",
        "wgmma",
        HOPPER,
        "static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32",
        "static_cast<uint64_t>(stride >> 4) << 16 | static_cast<uint64_t>(leading >> 4) << 32",
        often=True,
    ),
]
ALL = os.environ.get("STATEFUL_MUTATIONS") == "all"
TRIED = [mutation for mutation in MUTATIONS if ALL or mutation.often]


@pytest.mark.parametrize("mutation", TRIED, ids=lambda mutation: mutation.name)
def test_the_emulator_notices(mutation: Mutation, tmp_path: Path) -> None:
    if mutation.watched and not sanitizer():
        pytest.skip("g++ has no address sanitizer here")
    sources = tmp_path / "csrc"
    shutil.copytree(CSRC, sources)
    file = sources / "include" / "stateful" / mutation.file
    text = file.read_text()
    assert text.count(mutation.before) == 1
    file.write_text(text.replace(mutation.before, mutation.after))
    library = build(tmp_path, sources, WATCHED if mutation.watched else FEW)
    done = play(library, mutation.kernel, CASES, watched=mutation.watched)
    crashed = done.returncode < 0  # outside of all memory, or an operand is
    outside = mutation.watched and "AddressSanitizer" in done.stderr
    assert done.returncode == WRONG or crashed or outside, done.stdout + done.stderr


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_place_is_there_once(mutation: Mutation) -> None:
    text = (CSRC / "include" / "stateful" / mutation.file).read_text()
    assert text.count(mutation.before) == 1
