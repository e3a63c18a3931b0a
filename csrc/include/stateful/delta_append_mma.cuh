// SPDX-License-Identifier: Apache-2.0
// Kernel A: delta append attention by mma.sync and cp.async, for sm_80 and later.
//
// Few rows (query heads of a KV head times new tokens) attend to a long paged cache and to the new
// keys. A CTA walks through its segments; in each it holds the rows' queries in registers and
// streams key blocks through shared memory. With few rows the warps share a block's keys
// (kWarpsN > 1) and add up at the end. After FlashAttention-2 (arXiv:2307.08691), stream-K
// (arXiv:2301.03598) and FlashMLA's even cut over the SMs.
#pragma once
#include "softmax.cuh"

namespace stateful {

template <class T_, int D_, int kWarpsM_, int kWarpsN_, int kStages_ = 2>
struct MmaShape {
  using T = T_;
  static constexpr int D = D_;
  static constexpr int kWarpsM = kWarpsM_;  // along the rows, 16 each
  static constexpr int kWarpsN = kWarpsN_;  // along the keys of a block
  static constexpr int kStages = kStages_;
  static constexpr int kRows = 16 * kWarpsM;
  static constexpr int kKeys = D > 128 ? 32 : 64;
  static constexpr int kWarpKeys = kKeys / kWarpsN;
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN;
  static constexpr int kChunks = D / kChunk;
  static constexpr int kQueryBytes = kRows * D * 2;
  static constexpr int kStageBytes = 2 * kKeys * D * 2;
  static constexpr int kSumBytes = kWarpsN * kRows * (D + 2) * 4;
  static constexpr int kLoopBytes =
      kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
  static constexpr int kSharedBytes =
      kQueryBytes + kLoopBytes + static_cast<int>(sizeof(TileRows<kRows>));
  static_assert(kWarpKeys % 16 == 0, "a warp multiplies 16 keys at a time");
};

// The tiles that are built, by their rows.
template <class T, int D>
using Mma16 = MmaShape<T, D, 1, (D > 128 ? 2 : 4)>;
template <class T, int D>
using Mma32 = MmaShape<T, D, 2, 2>;
template <class T, int D>
using Mma64 = MmaShape<T, D, 4, 1>;

template <class S>
struct MmaShared {
  using T = typename S::T;
  T* queries;
  T* stages;
  float* sums;  // [kWarpsN][kRows][D], over the stages when these are done
  float* most;  // [kWarpsN][kRows]
  float* total;
  TileRows<S::kRows>* rows;

  STATEFUL_DEVICE explicit MmaShared(unsigned char* base) {
    queries = reinterpret_cast<T*>(base);
    stages = reinterpret_cast<T*>(base + S::kQueryBytes);
    sums = reinterpret_cast<float*>(stages);
    most = sums + S::kWarpsN * S::kRows * S::D;
    total = most + S::kWarpsN * S::kRows;
    rows = reinterpret_cast<TileRows<S::kRows>*>(base + S::kQueryBytes + S::kLoopBytes);
  }

  // 16-byte chunks are permuted by row, so that eight rows of a column meet eight banks.
  STATEFUL_DEVICE static T* at(T* matrix, int row, int chunk) {
    return matrix + row * S::D + ((chunk ^ (row & 7)) << 3);
  }
  STATEFUL_DEVICE T* keys(int stage) const { return stages + stage * (S::kStageBytes / 2); }
  STATEFUL_DEVICE T* values(int stage) const { return keys(stage) + S::kKeys * S::D; }
};

// What a warp has added up so far, for two rows in each thread (lane / 4 and 8 below it).
template <class S>
struct MmaState {
  float out[S::D / 8][4];
  float most[2];
  float total[2];
  int32_t step[2];  // token of the row in its sequence's new tokens; -1: no row
};

template <class S>
STATEFUL_DEVICE void load_queries(const Params& p, const MmaShared<S>& shared, int thread) {
  using T = typename S::T;
  for (int i = thread; i < S::kRows * S::kChunks; i += S::kThreads) {
    const int row = i / S::kChunks, chunk = i % S::kChunks;
    const bool valid = shared.rows->unit[row] >= 0;
    const T* from = static_cast<const T*>(p.q);
    if (valid)
      from = query_row<T>(p, shared.rows->unit[row], shared.rows->row[row]) + chunk * kChunk;
    copy_async(shared.at(shared.queries, row, chunk), from, valid);
  }
}

// Start copying a block's K and V; keys behind the end become zeros.
template <class S>
STATEFUL_DEVICE void load_block(const Params& p, const Tile& tile, const MmaShared<S>& shared,
                                int block, int stage, int thread) {
  using T = typename S::T;
  const KeyBlock b = key_block<S::kKeys>(tile, block);
  const int head = tile.unit.head;
  STATEFUL_UNROLL
  for (int i = thread; i < S::kKeys * S::kChunks; i += S::kThreads) {
    const int row = i / S::kChunks, chunk = i % S::kChunks;
    const bool valid = row < b.num_valid;
    const T *k = static_cast<const T*>(p.cache), *v = k;
    if (valid && b.is_new) {
      const int64_t token = tile.query0 + b.first + row;
      k = static_cast<const T*>(p.k_new) + token * p.k_token + head * p.k_head + chunk * kChunk;
      v = static_cast<const T*>(p.v_new) + token * p.v_token + head * p.v_head + chunk * kChunk;
    } else if (valid) {
      k = cached_key<T>(p, tile.unit.sequence, head, b.first + row) + chunk * kChunk;
      v = k + p.cache_v;
    }
    copy_async(shared.at(shared.keys(stage), row, chunk), k, valid);
    copy_async(shared.at(shared.values(stage), row, chunk), v, valid);
  }
}

// scores[rows x this warp's keys] = queries keys^T.
template <class S>
STATEFUL_DEVICE void multiply_keys(const MmaShared<S>& shared, int stage, int warp_m, int warp_n,
                                   int lane, float (&scores)[S::kWarpKeys / 8][4]) {
  using T = typename S::T;
  T* const keys = shared.keys(stage);
  STATEFUL_UNROLL
  for (int n = 0; n < S::kWarpKeys / 8; ++n)
    scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.f;
  STATEFUL_UNROLL
  for (int k = 0; k < S::D / 16; ++k) {
    uint32_t a[4];
    load_matrices(a, shared.at(shared.queries, warp_m * 16 + (lane & 15), k * 2 + (lane >> 4)));
    STATEFUL_UNROLL
    for (int n = 0; n < S::kWarpKeys / 8; n += 2) {
      uint32_t b[4];
      const int row = warp_n * S::kWarpKeys + n * 8 + (lane & 7) + ((lane >> 4) << 3);
      load_matrices(b, shared.at(keys, row, k * 2 + ((lane >> 3) & 1)));
      mma<T>(scores[n], a, b[0], b[1]);
      mma<T>(scores[n + 1], a, b[2], b[3]);
    }
  }
}

// out[rows x D] += weights values.
template <class S>
STATEFUL_DEVICE void multiply_values(const MmaShared<S>& shared, int stage, int warp_n, int lane,
                                     const float (&weights)[S::kWarpKeys / 8][4],
                                     MmaState<S>& state) {
  using T = typename S::T;
  T* const values = shared.values(stage);
  STATEFUL_UNROLL
  for (int k = 0; k < S::kWarpKeys / 16; ++k) {
    uint32_t a[4];
    pack_weights<T>(weights, k, a);
    STATEFUL_UNROLL
    for (int n = 0; n < S::D / 8; n += 2) {
      uint32_t b[4];
      const int row = warp_n * S::kWarpKeys + k * 16 + (lane & 15);
      load_matrices_transposed(b, shared.at(values, row, n + (lane >> 4)));
      mma<T>(state.out[n], a, b[0], b[1]);
      mma<T>(state.out[n + 1], a, b[2], b[3]);
    }
  }
}

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
    mask_scores<S::kKeys>(p, tile, key_block<S::kKeys>(tile, block), state.step,
                          warp_n * S::kWarpKeys, lane, scores);
    float kept[2];
    weigh_scores(scores, state.most, state.total, kept);
    scale_rows(state.out, kept);
    multiply_values<S>(shared, stage, warp_n, lane, scores, state);
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
    STATEFUL_UNROLL
    for (int i = 0; i < S::D / 8; ++i)
      *reinterpret_cast<float2*>(shared.sums + row * S::D + i * 8 + (lane & 3) * 2) =
          make_float2(state.out[i][2 * h], state.out[i][2 * h + 1]);
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
    const float inverse = total > 0.f ? 1.f / total : 0.f;
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
    append<T, S::D, S::kRows>(p, tile, thread, S::kThreads);
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
