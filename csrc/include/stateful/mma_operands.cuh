// SPDX-License-Identifier: Apache-2.0
// What kernel A multiplies: queries and key blocks in shared memory, and the products of a block.
//
// With a cache in fp8 the blocks are copied as they are and become halves on their way from shared
// memory to mma.sync: four neighbouring bytes of a key, as ldmatrix hands them to a thread, are its
// share of 16 columns if the queries' columns are permuted alike.
#pragma once
#include "softmax.cuh"

namespace stateful {

// T: of new K and V and of the result. C: of the cache; T, or Fp8, then of the queries too.
template <class T_, class C_, int D_, int kWarpsM_, int kWarpsN_>
struct MmaShape {
  using T = T_;
  using C = C_;
  static constexpr bool kFp8 = kIsFp8<C>;
  using Q = C;                                           // of the queries in global memory
  using M = std::conditional_t<kFp8, __half, T>;         // what is multiplied
  static constexpr int D = D_;
  static constexpr int kWarpsM = kWarpsM_;  // along the rows, 16 each
  static constexpr int kWarpsN = kWarpsN_;  // along the keys of a block
  static constexpr int kStages = kFp8 ? 4 : 2;
  static constexpr int kRows = 16 * kWarpsM;
  static constexpr int kKeys = D > 128 ? 32 : 64;
  static constexpr int kWarpKeys = kKeys / kWarpsN;
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN;
  static constexpr int kElements = 16 / static_cast<int>(sizeof(C));  // of the cache, in a chunk
  static constexpr int kChunks = D / kElements;                       // of a cached row
  static constexpr int kQueryBytes = kRows * D * 2;
  static constexpr int kStageBytes = 2 * kKeys * D * static_cast<int>(sizeof(C));
  static constexpr int kSumBytes = kWarpsN * kRows * (D + 2) * 4;
  static constexpr int kLoopBytes =
      kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
  static constexpr int kSharedBytes =
      kQueryBytes + kLoopBytes + static_cast<int>(sizeof(TileRows<kRows>));
  static_assert(kWarpKeys % 16 == 0, "a warp multiplies 16 keys at a time");
};

// The tiles that are built, by their rows.
template <class T, int D, class C = T>
using Mma16 = MmaShape<T, C, D, 1, (D > 128 ? 2 : 4)>;
template <class T, int D, class C = T>
using Mma32 = MmaShape<T, C, D, 2, 2>;
template <class T, int D, class C = T>
using Mma64 = MmaShape<T, C, D, 4, 1>;

template <class S>
struct MmaShared {
  using M = typename S::M;
  using C = typename S::C;
  M* queries;
  C* stages;
  float* sums;  // [kWarpsN][kRows][D], over the stages when these are done
  float* most;  // [kWarpsN][kRows]
  float* total;
  TileRows<S::kRows>* rows;

  STATEFUL_DEVICE explicit MmaShared(unsigned char* base) {
    queries = reinterpret_cast<M*>(base);
    stages = reinterpret_cast<C*>(base + S::kQueryBytes);
    sums = reinterpret_cast<float*>(stages);
    most = sums + S::kWarpsN * S::kRows * S::D;
    total = most + S::kWarpsN * S::kRows;
    rows = reinterpret_cast<TileRows<S::kRows>*>(base + S::kQueryBytes + S::kLoopBytes);
  }

  // 16-byte chunks are permuted by row, so that eight rows of a column meet eight banks.
  template <class E>
  STATEFUL_DEVICE static E* at(E* matrix, int row, int chunk) {
    constexpr int kElements = 16 / static_cast<int>(sizeof(E)), kRowChunks = S::D / kElements;
    constexpr int kMask = (kRowChunks < 8 ? kRowChunks : 8) - 1;
    constexpr int kRowsOfLine = kRowChunks < 8 ? 8 / kRowChunks : 1;  // a line: all banks
    return matrix + row * S::D + (chunk ^ ((row / kRowsOfLine) & kMask)) * kElements;
  }
  STATEFUL_DEVICE C* keys(int stage) const { return stages + stage * 2 * S::kKeys * S::D; }
  STATEFUL_DEVICE C* values(int stage) const { return keys(stage) + S::kKeys * S::D; }
};

// A chunk of a query row that is fp8, or zeros: of its 16 columns each thread of a quad multiplies
// four neighbours, two with the lower half of the keys' registers and two with the upper.
template <class S>
STATEFUL_DEVICE void store_query(const MmaShared<S>& shared, int row, int chunk, const Fp8* from) {
  const uint4 loaded =
      from == nullptr ? make_uint4(0, 0, 0, 0) : *reinterpret_cast<const uint4*>(from);
  uint4 low, high;
  expand(loaded.x, low.x, high.x);
  expand(loaded.y, low.y, high.y);
  expand(loaded.z, low.z, high.z);
  expand(loaded.w, low.w, high.w);
  *reinterpret_cast<uint4*>(shared.at(shared.queries, row, 2 * chunk)) = low;
  *reinterpret_cast<uint4*>(shared.at(shared.queries, row, 2 * chunk + 1)) = high;
}

// They are there behind the next wait for copies and barrier.
template <class S>
STATEFUL_DEVICE void load_queries(const Params& p, const MmaShared<S>& shared, int thread) {
  using Q = typename S::Q;
  for (int i = thread; i < S::kRows * S::kChunks; i += S::kThreads) {
    const int row = i / S::kChunks, chunk = i % S::kChunks;
    const bool valid = shared.rows->unit[row] >= 0;
    const Q* from = nullptr;
    if (valid)
      from = query_row<Q>(p, shared.rows->unit[row], shared.rows->row[row]) + chunk * S::kElements;
    if constexpr (S::kFp8)
      store_query<S>(shared, row, chunk, from);
    else
      copy_async(shared.at(shared.queries, row, chunk), valid ? from : p.q, valid);
  }
}

// A chunk of a new key or value, rounded as the cache will have it.
template <class T>
STATEFUL_DEVICE void store_rounded(Fp8* to, const T* from, float scale) {
  const uint2 low = quantize(from, scale), high = quantize(from + 8, scale);
  *reinterpret_cast<uint4*>(to) = make_uint4(low.x, low.y, high.x, high.y);
}

// Start copying a block's K and V; keys behind the end become zeros.
template <class S>
STATEFUL_DEVICE void load_block(const Params& p, const Tile& tile, const MmaShared<S>& shared,
                                int block, int stage, int thread) {
  using T = typename S::T;
  using C = typename S::C;
  const KeyBlock b = key_block<S::kKeys>(tile, block);
  const int head = tile.unit.head;
  STATEFUL_UNROLL
  for (int i = thread; i < S::kKeys * S::kChunks; i += S::kThreads) {
    const int row = i / S::kChunks, chunk = i % S::kChunks;
    const bool valid = row < b.num_valid;
    C* const key_to = shared.at(shared.keys(stage), row, chunk);
    C* const value_to = shared.at(shared.values(stage), row, chunk);
    const C* k = static_cast<const C*>(p.cache);
    const C* v = k;
    if (valid && b.is_new) {
      const int64_t token = tile.query0 + b.first + row;
      const T* const new_k = static_cast<const T*>(p.k_new) + token * p.k_token +
                             head * p.k_head + chunk * S::kElements;
      const T* const new_v = static_cast<const T*>(p.v_new) + token * p.v_token +
                             head * p.v_head + chunk * S::kElements;
      if constexpr (S::kFp8) {
        store_rounded(key_to, new_k, p.k_scale[head * p.k_scale_head]);
        store_rounded(value_to, new_v, p.v_scale[head * p.v_scale_head]);
        continue;
      } else {
        k = new_k;
        v = new_v;
      }
    } else if (valid) {
      k = cached_key<C>(p, tile.unit.sequence, head, b.first + row) + chunk * S::kElements;
      v = k + p.cache_v;
    }
    copy_async(key_to, k, valid);
    copy_async(value_to, v, valid);
  }
}

// scores[rows x this warp's keys] = queries keys^T.
template <class S>
STATEFUL_DEVICE void multiply_keys(const MmaShared<S>& shared, int stage, int warp_m, int warp_n,
                                   int lane, float (&scores)[S::kWarpKeys / 8][4]) {
  using M = typename S::M;
  auto* const keys = shared.keys(stage);
  const int query_row = warp_m * 16 + (lane & 15);
  STATEFUL_UNROLL
  for (int n = 0; n < S::kWarpKeys / 8; ++n)
    scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.f;
  STATEFUL_UNROLL
  for (int c = 0; c < S::kChunks; c += 2) {  // two chunks of keys
    constexpr int kSteps = S::kFp8 ? 2 : 1;  // of 16 columns
    uint32_t a[kSteps][4];
    STATEFUL_UNROLL
    for (int k = 0; k < kSteps; ++k)
      load_matrices(a[k], shared.at(shared.queries, query_row, (c * kSteps + 2 * k) + (lane >> 4)));
    STATEFUL_UNROLL
    for (int n = 0; n < S::kWarpKeys / 8; n += 2) {
      uint32_t b[4];
      const int row = warp_n * S::kWarpKeys + n * 8 + (lane & 7) + ((lane >> 4) << 3);
      load_matrices(b, shared.at(keys, row, c + ((lane >> 3) & 1)));
      if constexpr (S::kFp8) {
        STATEFUL_UNROLL
        for (int i = 0; i < 4; ++i) {
          uint32_t low, high;
          expand(b[i], low, high);
          mma<M>(scores[n + i / 2], a[i % 2], low, high);
        }
      } else {
        mma<M>(scores[n], a[0], b[0], b[1]);
        mma<M>(scores[n + 1], a[0], b[2], b[3]);
      }
    }
  }
}

// out[rows x D] += weights values. With fp8 a pair of tiles of `out` has 16 columns, the even ones
// in the first and the odd ones in the second: two neighbours stand in one element of ldmatrix.
template <class S>
STATEFUL_DEVICE void multiply_values(const MmaShared<S>& shared, int stage, int warp_n, int lane,
                                     const float (&weights)[S::kWarpKeys / 8][4],
                                     float (&out)[S::D / 8][4]) {
  using M = typename S::M;
  auto* const values = shared.values(stage);
  STATEFUL_UNROLL
  for (int k = 0; k < S::kWarpKeys / 16; ++k) {
    uint32_t a[4];
    pack_weights<M>(weights, k, a);
    const int row = warp_n * S::kWarpKeys + k * 16 + (lane & 15);
    STATEFUL_UNROLL
    for (int c = 0; c < S::kChunks; c += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, shared.at(values, row, c + (lane >> 4)));
      if constexpr (S::kFp8) {
        STATEFUL_UNROLL
        for (int i = 0; i < 2; ++i) {
          uint32_t even[2], odd[2];
          expand(by_parity(b[2 * i]), even[0], odd[0]);
          expand(by_parity(b[2 * i + 1]), even[1], odd[1]);
          mma<M>(out[2 * (c + i)], a, even[0], even[1]);
          mma<M>(out[2 * (c + i) + 1], a, odd[0], odd[1]);
        }
      } else {
        mma<M>(out[c], a, b[0], b[1]);
        mma<M>(out[c + 1], a, b[2], b[3]);
      }
    }
  }
}

}  // namespace stateful
