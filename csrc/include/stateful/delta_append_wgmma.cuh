// SPDX-License-Identifier: Apache-2.0
// Kernel B: delta append attention by wgmma and TMA, for sm_90a and more than 64 rows.
//
// One warpgroup produces, two consume. The producer's first warp copies pages, 16 rows in a box,
// into a ring of key blocks and a ring of value blocks; its other warps append the new rows. Each
// consumer holds 64 rows; it starts on the next block's scores before it has added up the last
// block's values. After FlashAttention-3 (arXiv:2407.08608).
#pragma once
#include "hopper.cuh"
#include "softmax.cuh"

namespace stateful {

template <class T_, int D_>
struct WgmmaShape {
  using T = T_;
  static constexpr int D = D_;
  static constexpr int kConsumers = 2;  // warpgroups, 64 rows each
  static constexpr int kStages = 2;
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kKeys = D > 128 ? 64 : 128;
  static constexpr int kThreads = kWarpgroup * (kConsumers + 1);
  static constexpr int kHalves = D / kBoxColumns;  // blocks of 64 columns
  static constexpr int kQueryHalfBytes = 64 * kBoxColumns * 2;
  static constexpr int kHalfBytes = kKeys * kBoxColumns * 2;
  static constexpr int kQueryBytes = kConsumers * kHalves * kQueryHalfBytes;
  static constexpr int kBlockBytes = kHalves * kHalfBytes;
  static constexpr int kRingBytes = kStages * kBlockBytes;
  static constexpr int kSharedBytes = kQueryBytes + 2 * kRingBytes + 4 * kStages * 8 +
                                      static_cast<int>(sizeof(TileRows<kRows>));
  static constexpr int kOutTiles = D / 8 > 16 ? 16 : D / 8;  // in one instruction
};

// Tensor maps over [columns, rows, heads, blocks] with boxes of 64 x 16, made by the host.
struct TensorMaps {
  TensorMap cache;  // 2 D columns, rows of a page
  TensorMap k_new;  // D columns, tokens, KV heads, 1
  TensorMap v_new;
};

constexpr int kAllConsumers = 1;   // named barriers; 0 is __syncthreads
constexpr int kOneConsumer = 2;    // and the one behind it

template <class S>
struct WgmmaShared {
  unsigned char* queries;
  unsigned char* keys;
  unsigned char* values;
  uint64_t *keys_full, *keys_free, *values_full, *values_free;
  TileRows<S::kRows>* rows;

  STATEFUL_DEVICE explicit WgmmaShared(unsigned char* base) {
    queries = base;
    keys = base + S::kQueryBytes;
    values = keys + S::kRingBytes;
    keys_full = reinterpret_cast<uint64_t*>(values + S::kRingBytes);
    keys_free = keys_full + S::kStages;
    values_full = keys_free + S::kStages;
    values_free = values_full + S::kStages;
    rows = reinterpret_cast<TileRows<S::kRows>*>(values_free + S::kStages);
  }
};

// A place in the rings: every role counts blocks alike.
struct RingPlace {
  int stage = 0;
  int phase = 0;
  template <int kStages>
  STATEFUL_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Copy one box row of a block's keys or values; a lane each. Rows behind the end become zeros, but
// for those in the last box: the consumers clear them.
template <class S>
STATEFUL_DEVICE void copy_rows(const Params& p, const TensorMaps& maps, const Tile& tile,
                               const KeyBlock& b, unsigned char* to, int box, bool is_value,
                               uint64_t* full) {
  const int row = box * kBoxRows;
  const TensorMap* map = &maps.cache;
  int column = is_value ? S::D : 0, first = 0, place = -1;  // block -1 does not exist: zeros
  if (b.is_new) {
    map = is_value ? &maps.v_new : &maps.k_new;
    column = 0;
    first = tile.query0 + b.first + row;
    if (row < b.num_valid) place = 0;
  } else if (row < b.num_valid) {
    const int key = b.first + row, page = key / p.page_size;
    place = p.block_table[static_cast<int64_t>(tile.unit.sequence) * p.table_stride + page];
    first = key - page * p.page_size;
  }
  STATEFUL_UNROLL
  for (int half = 0; half < S::kHalves; ++half)
    copy_box(to + half * S::kHalfBytes + row * kBoxColumns * 2, map, column + half * kBoxColumns,
             first, tile.unit.head, place, full);
}

// The producer's first warp.
template <class S>
STATEFUL_DEVICE void produce(const Params& p, const TensorMaps& maps,
                             const WgmmaShared<S>& shared, int lane) {
  constexpr int kBoxes = S::kKeys / kBoxRows;
  static_assert(2 * kBoxes <= kWarp, "a lane for each row of boxes");
  RingPlace ring;
  const int end = p.plan.cta_segments[blockIdx.x + 1];
  for (int index = p.plan.cta_segments[blockIdx.x]; index < end; ++index) {
    const Tile tile = open_tile(p, index);
    for (int block = tile.segment.block0; block < tile.segment.block1; ++block) {
      const KeyBlock b = key_block<S::kKeys>(tile, block);
      const int at = ring.stage * S::kBlockBytes;
      barrier_wait(&shared.keys_free[ring.stage], ring.phase ^ 1);
      if (lane == 0) barrier_expect(&shared.keys_full[ring.stage], S::kBlockBytes);
      join_lanes();
      if (lane < kBoxes)
        copy_rows<S>(p, maps, tile, b, shared.keys + at, lane, false,
                     &shared.keys_full[ring.stage]);
      barrier_wait(&shared.values_free[ring.stage], ring.phase ^ 1);
      if (lane == 0) barrier_expect(&shared.values_full[ring.stage], S::kBlockBytes);
      join_lanes();
      if (lane < kBoxes)
        copy_rows<S>(p, maps, tile, b, shared.values + at, lane, true,
                     &shared.values_full[ring.stage]);
      ring.advance<S::kStages>();
    }
  }
}

// The producer's other warps.
template <class S>
STATEFUL_DEVICE void append_all(const Params& p, int thread, int num_threads) {
  const int end = p.plan.cta_segments[blockIdx.x + 1];
  for (int index = p.plan.cta_segments[blockIdx.x]; index < end; ++index)
    append<typename S::T, typename S::T, S::D, S::kRows>(p, open_tile(p, index), thread, num_threads);
}

// This warpgroup's 64 rows of queries, swizzled as wgmma reads them.
template <class S>
STATEFUL_DEVICE void hold_queries(const Params& p, const WgmmaShared<S>& shared, int consumer,
                                  int thread) {
  using T = typename S::T;
  unsigned char* const base = shared.queries + consumer * S::kHalves * S::kQueryHalfBytes;
  STATEFUL_NO_UNROLL
  for (int i = thread; i < 64 * (S::D / kChunk); i += kWarpgroup) {
    const int row = i / (S::D / kChunk), chunk = i % (S::D / kChunk);
    const int unit = shared.rows->unit[consumer * 64 + row];
    uint4 value = make_uint4(0, 0, 0, 0);
    if (unit >= 0)
      value = *reinterpret_cast<const uint4*>(
          query_row<T>(p, unit, shared.rows->row[consumer * 64 + row]) + chunk * kChunk);
    unsigned char* const line = base + (chunk / 8) * S::kQueryHalfBytes + row * kBoxColumns * 2;
    store_for_async(line + (((chunk & 7) ^ (row & 7)) << 4), value);
  }
  fence_shared_async();
  named_barrier(kOneConsumer + consumer, kWarpgroup);
}

// Values behind the last valid row of its box are whatever the page holds: weight 0 times NaN.
template <class S>
STATEFUL_DEVICE void clear_tail(const KeyBlock& b, unsigned char* values, int consumer, int thread) {
  if (b.is_full || b.num_valid % kBoxRows == 0) return;
  const int num_rows = kBoxRows - b.num_valid % kBoxRows;
  STATEFUL_NO_UNROLL
  for (int i = thread; i < num_rows * S::kHalves * 8; i += kWarpgroup) {
    const int row = b.num_valid + i / (S::kHalves * 8), chunk = i % (S::kHalves * 8);
    store_for_async(values + (chunk / 8) * S::kHalfBytes + row * kBoxColumns * 2 + (chunk & 7) * 16,
                    make_uint4(0, 0, 0, 0));
  }
  fence_shared_async();
  named_barrier(kOneConsumer + consumer, kWarpgroup);
}

template <class S>
struct WgmmaState {
  float out[S::D / 8][4];
  float scores[S::kKeys / 8][4];
  float most[2];
  float total[2];
  int32_t step[2];
};

// Begin scores[64 x keys] = queries keys^T.
template <class S>
STATEFUL_DEVICE void begin_scores(const WgmmaShared<S>& shared, int consumer, int stage,
                                  WgmmaState<S>& state) {
  const uint32_t queries =
      shared_address(shared.queries) + consumer * S::kHalves * S::kQueryHalfBytes;
  const uint32_t keys = shared_address(shared.keys) + stage * S::kBlockBytes;
  hold(state.scores);
  wgmma_fence();
  STATEFUL_UNROLL
  for (int k = 0; k < S::D / 16; ++k) {
    const int half = k / 4, inside = (k % 4) * 32;
    Wgmma<typename S::T, S::kKeys / 8>::shared(
        state.scores, 0,
        matrix_descriptor(queries + half * S::kQueryHalfBytes + inside, 16, kSwizzleBytes),
        matrix_descriptor(keys + half * S::kHalfBytes + inside, 16, kSwizzleBytes), k > 0);
  }
  wgmma_commit();
}

// Begin out[64 x D] += weights values.
template <class S>
STATEFUL_DEVICE void begin_values(const WgmmaShared<S>& shared, int stage,
                                  const uint32_t (&weights)[S::kKeys / 16][4],
                                  WgmmaState<S>& state) {
  const uint32_t values = shared_address(shared.values) + stage * S::kBlockBytes;
  hold(state.out);
  wgmma_fence();
  STATEFUL_UNROLL
  for (int k = 0; k < S::kKeys / 16; ++k)
    STATEFUL_UNROLL
    for (int tile = 0; tile < S::D / 8; tile += S::kOutTiles)
      Wgmma<typename S::T, S::kOutTiles>::values(
          state.out, tile, weights[k],
          matrix_descriptor(
              values + (tile / 8) * S::kHalfBytes + k * 2 * kSwizzleBytes, S::kHalfBytes,
              kSwizzleBytes));
  wgmma_commit();
}

template <class S>
STATEFUL_DEVICE void pack_all(const WgmmaState<S>& state, uint32_t (&weights)[S::kKeys / 16][4]) {
  STATEFUL_UNROLL
  for (int k = 0; k < S::kKeys / 16; ++k)
    pack_weights<typename S::T>(state.scores, k, weights[k]);
}

// Stream the segment's blocks through one consumer's 64 rows.
template <class S>
STATEFUL_DEVICE void consume_blocks(const Params& p, const Tile& tile,
                                    const WgmmaShared<S>& shared, RingPlace& ring, int consumer,
                                    int thread, WgmmaState<S>& state) {
  const int lane = thread % kWarp, end = tile.segment.block1;
  float kept[2];
  uint32_t weights[S::kKeys / 16][4];
  KeyBlock b = key_block<S::kKeys>(tile, tile.segment.block0);
  barrier_wait(&shared.keys_full[ring.stage], ring.phase);
  begin_scores<S>(shared, consumer, ring.stage, state);
  wgmma_wait<0>();
  hold(state.scores);
  if (lane == 0) barrier_arrive(&shared.keys_free[ring.stage]);
  mask_scores<S::kKeys>(p, tile, b, p.scale, state.step, 0, lane, state.scores);
  weigh_scores(state.scores, state.most, state.total, kept);
  for (int block = tile.segment.block0 + 1; block < end; ++block) {
    RingPlace next = ring;
    next.advance<S::kStages>();
    pack_all<S>(state, weights);
    barrier_wait(&shared.keys_full[next.stage], next.phase);
    begin_scores<S>(shared, consumer, next.stage, state);
    barrier_wait(&shared.values_full[ring.stage], ring.phase);
    clear_tail<S>(b, shared.values + ring.stage * S::kBlockBytes, consumer, thread);
    begin_values<S>(shared, ring.stage, weights, state);
    wgmma_wait<1>();
    hold(state.scores);
    if (lane == 0) barrier_arrive(&shared.keys_free[next.stage]);
    b = key_block<S::kKeys>(tile, block);
    mask_scores<S::kKeys>(p, tile, b, p.scale, state.step, 0, lane, state.scores);
    weigh_scores(state.scores, state.most, state.total, kept);
    wgmma_wait<0>();
    hold(state.out);
    if (lane == 0) barrier_arrive(&shared.values_free[ring.stage]);
    scale_rows(state.out, kept);
    ring = next;
  }
  pack_all<S>(state, weights);
  barrier_wait(&shared.values_full[ring.stage], ring.phase);
  clear_tail<S>(b, shared.values + ring.stage * S::kBlockBytes, consumer, thread);
  begin_values<S>(shared, ring.stage, weights, state);
  wgmma_wait<0>();
  hold(state.out);
  if (lane == 0) barrier_arrive(&shared.values_free[ring.stage]);
  ring.advance<S::kStages>();
}

// Write two neighbouring columns of a row.
template <class S>
STATEFUL_DEVICE void store_rows(const Params& p, const Tile& tile, const WgmmaShared<S>& shared,
                                int consumer, int thread, WgmmaState<S>& state) {
  using T = typename S::T;
  const int lane = thread % kWarp;
  STATEFUL_UNROLL
  for (int h = 0; h < 2; ++h) {
    float total = state.total[h];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    const int row = consumer * 64 + (thread / kWarp) * 16 + (lane >> 2) + 8 * h;
    const int index = shared.rows->unit[row];
    if (index < 0) continue;
    const Unit unit = p.plan.units[index];
    const float inverse = total > 0.f ? 1.f / total : 0.f;
    const int inside = shared.rows->row[row], column = (lane & 3) * 2;
    if (unit.num_parts == 1) {
      T* const to = out_row<T>(p, unit, inside) + column;
      STATEFUL_UNROLL
      for (int i = 0; i < S::D / 8; ++i)
        *reinterpret_cast<uint32_t*>(to + i * 8) =
            pack<T>(state.out[i][2 * h] * inverse, state.out[i][2 * h + 1] * inverse);
      continue;
    }
    const int64_t at = (static_cast<int64_t>(unit.slot) + tile.segment.part) * S::kRows + inside;
    if ((lane & 3) == 0)
      store_fresh(p.partial_lse + at, total > 0.f ? state.most[h] + log2f(total) : -INFINITY);
    STATEFUL_UNROLL
    for (int i = 0; i < S::D / 8; ++i)
      store_fresh(reinterpret_cast<float2*>(p.partial_out + at * S::D + i * 8 + column),
                  make_float2(state.out[i][2 * h] * inverse, state.out[i][2 * h + 1] * inverse));
  }
}

template <class S>
STATEFUL_DEVICE void consume(const Params& p, const WgmmaShared<S>& shared, int consumer,
                             int thread) {
  const auto join = [] { named_barrier(kAllConsumers, S::kConsumers * kWarpgroup); };
  const int all = consumer * kWarpgroup + thread;
  const int end = p.plan.cta_segments[blockIdx.x + 1];
  RingPlace ring;
  for (int index = p.plan.cta_segments[blockIdx.x]; index < end; ++index) {
    const Tile tile = open_tile(p, index);
    find_rows<S::kRows>(p, tile, *shared.rows, all);
    join();
    hold_queries<S>(p, shared, consumer, thread);
    WgmmaState<S> state;
    STATEFUL_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = (thread / kWarp) * 16 + (thread % kWarp) / 4 + 8 * h;
      state.step[h] = step_of(p, *shared.rows, consumer * 64 + row);
      state.most[h] = -INFINITY;
      state.total[h] = 0.f;
    }
    STATEFUL_UNROLL
    for (int i = 0; i < S::D / 8; ++i)
      state.out[i][0] = state.out[i][1] = state.out[i][2] = state.out[i][3] = 0.f;
    consume_blocks<S>(p, tile, shared, ring, consumer, thread, state);
    const Tile done = open_tile(p, index);  // again: no registers for it in the loop
    store_rows<S>(p, done, shared, consumer, thread, state);
    finish<typename S::T, S::D, S::kRows>(p, done, *shared.rows, all,
                                          S::kConsumers * kWarpgroup, join);
  }
}

template <class S>
STATEFUL_DEVICE void delta_append_roles(const Params& p, const TensorMaps& maps) {
  const WgmmaShared<S> shared(shared_memory());
  const int thread = threadIdx.x, role = thread / kWarpgroup, inside = thread % kWarpgroup;
  if (thread == 0) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      barrier_init(&shared.keys_full[stage], 1);
      barrier_init(&shared.values_full[stage], 1);
      barrier_init(&shared.keys_free[stage], S::kConsumers * kWarpgroup / kWarp);
      barrier_init(&shared.values_free[stage], S::kConsumers * kWarpgroup / kWarp);
    }
    barrier_fence();
  }
  __syncthreads();
  if (role == 0) {
    fewer_registers<40>();
    if (inside < kWarp)
      produce<S>(p, maps, shared, inside);
    else
      append_all<S>(p, inside - kWarp, kWarpgroup - kWarp);
  } else {
    more_registers<232>();
    consume<S>(p, shared, role - 1, inside);
  }
}

#ifdef STATEFUL_EMULATOR
template <class S>
inline void delta_append_wgmma(const Params p, const TensorMaps& maps) {
  delta_append_roles<S>(p, maps);
}
#else
template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    delta_append_wgmma(const __grid_constant__ Params p, const __grid_constant__ TensorMaps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // the launcher refuses other devices
  delta_append_roles<S>(p, maps);
#endif
}
#endif

}  // namespace stateful
