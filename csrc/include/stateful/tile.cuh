// SPDX-License-Identifier: Apache-2.0
// What both kernels share: which rows a segment works on, the append, and where results go.
#pragma once
#include "plan.cuh"
#include "prim.cuh"
#include "quantized.cuh"

namespace stateful {

// In shared memory: the rows of the segment that runs.
template <int kRows>
struct TileRows {
  int32_t unit[kRows];      // -1: no row here
  int32_t row[kRows];       // in its unit
  int32_t is_last[kRows];   // by member: this CTA was the last one to add to it
};

// The same in every thread.
struct Tile {
  Segment segment;
  Unit unit;            // of a group: its first member
  int32_t num_members;
  int32_t member0;      // of a group
  int32_t query0;       // first token of the sequence in this batch
  int32_t num_new;      // tokens of the sequence in this batch
  int32_t num_cached;   // its keys in the cache
  int32_t first_key;
  int32_t end_key;      // cached keys [first_key, end_key) are read
  int32_t num_cached_blocks;
};

STATEFUL_DEVICE Tile open_tile(const Params& p, int index) {
  Tile t;
  t.segment = p.plan.segments[index];
  t.unit = p.plan.units[t.segment.unit];
  t.query0 = p.query_start[t.unit.sequence];
  t.num_new = p.query_start[t.unit.sequence + 1] - t.query0;
  t.num_cached = p.seq_lens[t.unit.sequence] - t.num_new;
  t.num_members = 1;
  t.member0 = 0;
  t.first_key = t.unit.first_key;
  t.end_key = t.num_cached;
  t.num_cached_blocks = t.unit.num_cached_blocks;
  if (t.segment.group >= 0) {
    const Group group = p.plan.groups[t.segment.group];
    t.num_members = group.num_members;
    t.member0 = group.member0;
    t.first_key = 0;
    t.end_key = group.num_keys;
    t.num_cached_blocks = t.segment.block1;
  }
  return t;
}

template <int kRows>
STATEFUL_DEVICE int rows_of(const Params& p, const Unit& unit) {
  const int num_new = p.query_start[unit.sequence + 1] - p.query_start[unit.sequence];
  const int rest = num_new * p.group_size - unit.row0;
  return rest < kRows ? rest : kRows;
}

STATEFUL_DEVICE Member member_of(const Params& p, const Tile& tile, int index) {
  if (tile.segment.group < 0) return Member{tile.segment.unit, 0};
  return p.plan.members[tile.member0 + index];
}

// Fill in the row map. Call with at least kRows threads, and synchronize behind it.
template <int kRows>
STATEFUL_DEVICE void find_rows(const Params& p, const Tile& tile, TileRows<kRows>& rows, int thread) {
  if (thread >= kRows) return;
  rows.unit[thread] = -1;
  rows.row[thread] = 0;
  for (int i = 0; i < tile.num_members; ++i) {
    const Member member = member_of(p, tile, i);
    const int row = thread - member.row;
    if (row >= 0 && row < rows_of<kRows>(p, p.plan.units[member.unit])) {
      rows.unit[thread] = member.unit;
      rows.row[thread] = row;
    }
  }
}

// Where a row stands among the tokens and query heads of the batch.
struct Place {
  int64_t token;  // of the batch
  int32_t head;   // query head
  int32_t step;   // token of its sequence in this batch
};

STATEFUL_DEVICE Place place_of(const Params& p, const Unit& unit, int row) {
  const int whole = unit.row0 + row;
  const int step = whole / p.group_size;
  return Place{static_cast<int64_t>(p.query_start[unit.sequence]) + step,
               unit.head * p.group_size + (whole - step * p.group_size), step};
}

// Q: the type of the queries.
template <class Q>
STATEFUL_DEVICE const Q* query_row(const Params& p, int unit, int row) {
  const Place place = place_of(p, p.plan.units[unit], row);
  return static_cast<const Q*>(p.q) + place.token * p.q_token + place.head * p.q_head;
}

template <class T>
STATEFUL_DEVICE T* out_row(const Params& p, const Unit& unit, int row) {
  const Place place = place_of(p, unit, row);
  return static_cast<T*>(p.out) + place.token * p.out_token + place.head * p.out_head;
}

// The K of a cached key of one KV head; its V stands cache_v elements behind.
template <class C>
STATEFUL_DEVICE const C* cached_key(const Params& p, int sequence, int head, int key) {
  const int page = key / p.page_size;
  const int64_t block = p.block_table[static_cast<int64_t>(sequence) * p.table_stride + page];
  return static_cast<const C*>(p.cache) + block * p.cache_block +
         static_cast<int64_t>(key - page * p.page_size) * p.cache_token + head * p.cache_head;
}

// Write K and V of the tokens whose first row lies in this tile into the cache. Only the segment
// that holds the end of its unit's keys does so: each new row is written exactly once. Nothing in
// this launch reads them from there.
template <class T, class C, int D, int kRows>
STATEFUL_DEVICE void append(const Params& p, const Tile& tile, int thread, int num_threads) {
  if (!tile.segment.last) return;
  constexpr int kChunks = D / kChunk;
  const int group = p.group_size, head = tile.unit.head;
  const int begin = (tile.unit.row0 + group - 1) / group;
  const int end_row = tile.unit.row0 + rows_of<kRows>(p, tile.unit);
  const int end = (end_row + group - 1) / group;
  for (int i = thread; i < (end - begin) * kChunks; i += num_threads) {
    const int64_t token = tile.query0 + begin + i / kChunks;
    const int column = (i % kChunks) * kChunk;
    const int64_t slot = p.slot_mapping[token];
    if (slot < 0) continue;
    const int64_t block = slot / p.page_size;
    C* const key = static_cast<C*>(p.cache) + block * p.cache_block +
                   (slot - block * p.page_size) * p.cache_token + head * p.cache_head + column;
    const T* const k =
        static_cast<const T*>(p.k_new) + token * p.k_token + head * p.k_head + column;
    const T* const v =
        static_cast<const T*>(p.v_new) + token * p.v_token + head * p.v_head + column;
    store_cached(key, k, p.k_scale + head * p.k_scale_head);
    store_cached(key + p.cache_v, v, p.v_scale + head * p.v_scale_head);
  }
}

template <class T>
STATEFUL_DEVICE void store4(T* to, float4 value) {
  uint2 bits;
  bits.x = pack<T>(value.x, value.y);
  bits.y = pack<T>(value.z, value.w);
  *reinterpret_cast<uint2*>(to) = bits;
}

// One row's four columns: to the result, or to the partial results where others add to it.
template <class T, int D, int kRows>
STATEFUL_DEVICE void store_part(const Params& p, const Tile& tile, const TileRows<kRows>& rows,
                                int row, int column, float4 value, float lse) {
  const Unit unit = p.plan.units[rows.unit[row]];
  if (unit.num_parts == 1) {
    store4<T>(out_row<T>(p, unit, rows.row[row]) + column, value);
    return;
  }
  const int64_t at =
      (static_cast<int64_t>(unit.slot) + tile.segment.part) * kRows + rows.row[row];
  store_fresh(reinterpret_cast<float4*>(p.partial_out + at * D + column), value);
  if (column == 0) store_fresh(p.partial_lse + at, lse);
}

}  // namespace stateful
