// SPDX-License-Identifier: Apache-2.0
// What the kernels are told: one plan a step, shared by all layers, and the tensors of one layer.
//
// The plan is made on the host (vllm_stateful/attention/plan.py, which has the same fields in the
// same order) and read by a fixed grid, so that a CUDA graph can replay it: only its contents
// change. Lengths may be planned too long (asynchronous scheduling knows upper bounds only); the
// kernels clamp to the lengths that stand in device memory.
#pragma once
#include <cstdint>

namespace stateful {

// A tile of rows: row0 .. row0 + tile_rows of one sequence and one KV head, all keys they may see.
// A row is one query head at one token: row = token * group_size + head within the KV head.
struct Unit {
  int32_t sequence;
  int32_t head;               // KV head
  int32_t row0;
  int32_t first_key;          // keys before it belong to a shared prefix or lie outside the window
  int32_t num_cached_blocks;  // planned blocks of cached keys; the blocks behind them are new keys
  int32_t num_parts;          // how many segments add to it; 1: the result is written directly
  int32_t slot;               // of its part 0 among the partial results; unused with one part
  int32_t padding;
};

// What one CTA does in one go: key blocks [block0, block1) of a unit, or of a shared prefix for
// the rows of several units.
struct Segment {
  int32_t unit;    // with a group: its first member
  int32_t group;   // -1: none
  int32_t block0;
  int32_t block1;
  int32_t part;    // place of the result among the parts of each unit
  int32_t last;    // 1: holds the end of the unit's keys, and so appends its new rows
  int32_t padding[2];
};

// A shared prefix: rows of several units of one KV head in one tile.
struct Group {
  int32_t member0;     // in members; they stand in the order of their rows
  int32_t num_members;
  int32_t num_keys;    // keys 0 .. num_keys of the first member's block table
  int32_t padding;
};

struct Member {
  int32_t unit;
  int32_t row;  // of the unit's first row in the group's tile
};

struct Plan {
  const int32_t* cta_segments;  // [grid + 1], where each CTA's segments begin
  const Segment* segments;
  const Unit* units;
  const Group* groups;
  const Member* members;
};

// Strides count elements. KV layout of vLLM 0.32: [block, token, head, K then V], any strides. Where
// the cache is fp8, q is too, and each has a scale: what one unit of it stands for.
struct Params {
  Plan plan;
  const void* q;      // [tokens, q heads, D]
  const void* k_new;  // [tokens, KV heads, D]
  const void* v_new;
  void* out;          // [tokens, q heads, D]
  void* cache;        // of this layer
  float* partial_out;       // [slots, tile_rows, D]
  float* partial_lse;       // [slots, tile_rows], base 2
  uint32_t* arrivals;       // [slots], zero before and after each launch
  const int32_t* block_table;    // [sequences, table_stride]
  const int32_t* query_start;    // [sequences + 1]
  const int32_t* seq_lens;       // [sequences], cached and new
  const int64_t* slot_mapping;   // [tokens], -1: do not append
  const float* q_scale;          // fp8: [KV heads], or one for all with a stride of 0
  const float* k_scale;
  const float* v_scale;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head;
  int64_t cache_block, cache_token, cache_head, cache_v;
  int32_t group_size;    // query heads of one KV head
  int32_t page_size;     // a multiple of 16
  int32_t table_stride;
  int32_t q_scale_head, k_scale_head, v_scale_head;
  int32_t window;        // keys a row sees, its own included; 0: all
  float scale;           // times log2(e) where there is no soft cap
  float soft_cap;        // 0: none
};

}  // namespace stateful
