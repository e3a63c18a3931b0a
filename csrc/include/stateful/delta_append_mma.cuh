// SPDX-License-Identifier: Apache-2.0
// Kernel A: delta append attention by mma.sync and cp.async, for sm_80 and later.
//
// Few rows (query heads of a KV head times new tokens) attend to a long paged cache and to the new
// keys. A CTA walks through its segments; in each it holds the rows' queries in shared memory and
// streams key blocks through it. With few rows the warps share a block's keys
// (kWarpsN > 1) and add up at the end. After FlashAttention-2 (arXiv:2307.08691), stream-K
// (arXiv:2301.03598) and FlashMLA's even cut over the SMs.
#pragma once
#include "mma_operands.cuh"
#include "softmax.cuh"

namespace stateful {

// What a warp has added up so far, for two rows in each thread (lane / 4 and 8 below it).
template <class S>
struct MmaState {
  float out[S::D / 8][4];
  float most[2];
  float total[2];
  int32_t step[2];  // token of the row in its sequence's new tokens; -1: no row
};

template <class S>
STATEFUL_DEVICE void start_state(const Params& p, const MmaShared<S>& shared, int first_row,
                                 MmaState<S>& state) {
  STATEFUL_UNROLL
  for (int h = 0; h < 2; ++h) {
    state.step[h] = step_of(p, *shared.rows, first_row + 8 * h);
    state.most[h] = -INFINITY;
    state.total[h] = 0.f;
  }
  STATEFUL_UNROLL
  for (int i = 0; i < S::D / 8; ++i)
    state.out[i][0] = state.out[i][1] = state.out[i][2] = state.out[i][3] = 0.f;
}

// Stream the segment's key blocks.
template <class S>
STATEFUL_DEVICE void walk_blocks(const Params& p, const Tile& tile, const MmaShared<S>& shared,
                                 MmaState<S>& state, int thread) {
  const int lane = thread % kWarp, warp = thread / kWarp;
  const int warp_m = warp % S::kWarpsM, warp_n = warp / S::kWarpsM;
  const int begin = tile.segment.block0, end = tile.segment.block1;
  const float scale = score_scale<typename S::C>(p, tile.unit.head);
  STATEFUL_UNROLL
  for (int i = 0; i < S::kStages - 1; ++i) {
    if (begin + i < end) load_block<S>(p, tile, shared, begin + i, i, thread);
    copy_commit();
  }
  int stage = 0;
  for (int block = begin; block < end; ++block) {
    copy_wait<S::kStages - 2>();
    __syncthreads();  // the block is there, and all are done with the one before
    const int ahead = block + S::kStages - 1;
    const int free_stage = stage == 0 ? S::kStages - 1 : stage - 1;
    if (ahead < end) load_block<S>(p, tile, shared, ahead, free_stage, thread);
    copy_commit();
    float scores[S::kWarpKeys / 8][4];
    multiply_keys<S>(shared, stage, warp_m, warp_n, lane, scores);
    mask_scores<S::kKeys>(p, tile, key_block<S::kKeys>(tile, block), scale, state.step,
                          warp_n * S::kWarpKeys, lane, scores);
    float kept[2];
    weigh_scores(scores, state.most, state.total, kept);
    scale_rows(state.out, kept);
    multiply_values<S>(shared, stage, warp_n, lane, scores, state.out);
    stage = stage + 1 == S::kStages ? 0 : stage + 1;
  }
  copy_wait<0>();
  __syncthreads();
}

// Lay what each warp has into shared memory, in place of the key blocks.
template <class S>
STATEFUL_DEVICE void lay_down(const MmaShared<S>& shared, MmaState<S>& state, int thread) {
  const int lane = thread % kWarp, warp = thread / kWarp;
  const int warp_m = warp % S::kWarpsM, warp_n = warp / S::kWarpsM;
  STATEFUL_UNROLL
  for (int h = 0; h < 2; ++h) {
    float total = state.total[h];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    const int row = warp_n * S::kRows + warp_m * 16 + (lane >> 2) + 8 * h;
    if ((lane & 3) == 0) {
      shared.most[row] = state.most[h];
      shared.total[row] = total;
    }
    float* const sums = shared.sums + row * S::D;
    if constexpr (kIsFp8<typename S::C>) {  // see multiply_values: a pair of tiles has each other column
      STATEFUL_UNROLL
      for (int i = 0; i < S::D / 8; i += 2)
        *reinterpret_cast<float4*>(sums + i * 8 + (lane & 3) * 4) =
            make_float4(state.out[i][2 * h], state.out[i + 1][2 * h], state.out[i][2 * h + 1],
                        state.out[i + 1][2 * h + 1]);
    } else {
      STATEFUL_UNROLL
      for (int i = 0; i < S::D / 8; ++i)
        *reinterpret_cast<float2*>(sums + i * 8 + (lane & 3) * 2) =
            make_float2(state.out[i][2 * h], state.out[i][2 * h + 1]);
    }
  }
}

// Add up over the warps that shared the keys, and store.
template <class S>
STATEFUL_DEVICE void store_rows(const Params& p, const Tile& tile, const MmaShared<S>& shared,
                                int thread) {
  using T = typename S::T;
  for (int i = thread; i < S::kRows * (S::D / 4); i += S::kThreads) {
    const int row = i / (S::D / 4), column = (i % (S::D / 4)) * 4;
    if (shared.rows->unit[row] < 0) continue;
    float most = -INFINITY;
    STATEFUL_UNROLL
    for (int n = 0; n < S::kWarpsN; ++n) most = fmaxf(most, shared.most[n * S::kRows + row]);
    const float base = most == -INFINITY ? 0.f : most;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    float total = 0.f;
    STATEFUL_UNROLL
    for (int n = 0; n < S::kWarpsN; ++n) {
      const int at = n * S::kRows + row;
      const float weight = exp2_fast(shared.most[at] - base);
      const float4 part = *reinterpret_cast<const float4*>(shared.sums + at * S::D + column);
      total += weight * shared.total[at];
      sum.x += weight * part.x;
      sum.y += weight * part.y;
      sum.z += weight * part.z;
      sum.w += weight * part.w;
    }
    const float inverse =
        total > 0.f ? value_scale<typename S::C>(p, tile.unit.head) / total : 0.f;
    const float lse = total > 0.f ? base + log2f(total) : -INFINITY;
    sum = make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse);
    store_part<T, S::D, S::kRows>(p, tile, *shared.rows, row, column, sum, lse);
  }
}

template <class S>
STATEFUL_GLOBAL
#ifndef STATEFUL_EMULATOR
__launch_bounds__(S::kThreads, 2)
#endif
delta_append_mma(const Params p) {
  using T = typename S::T;
  const MmaShared<S> shared(shared_memory());
  const int thread = threadIdx.x, lane = thread % kWarp;
  const int warp_m = (thread / kWarp) % S::kWarpsM;
  const int end = p.plan.cta_segments[blockIdx.x + 1];
  for (int index = p.plan.cta_segments[blockIdx.x]; index < end; ++index) {
    const Tile tile = open_tile(p, index);
    find_rows<S::kRows>(p, tile, *shared.rows, thread);
    __syncthreads();
    load_queries<S>(p, shared, thread);  // arrives with the first block
    append<T, typename S::C, S::D, S::kRows>(p, tile, thread, S::kThreads);
    MmaState<S> state;
    start_state<S>(p, shared, warp_m * 16 + (lane >> 2), state);
    walk_blocks<S>(p, tile, shared, state, thread);
    lay_down<S>(shared, state, thread);
    __syncthreads();
    store_rows<S>(p, tile, shared, thread);
    finish<T, S::D, S::kRows>(p, tile, *shared.rows, thread, S::kThreads,
                              [] { __syncthreads(); });
    __syncthreads();  // the next segment reuses the rows and the stages
  }
}

}  // namespace stateful
