// SPDX-License-Identifier: Apache-2.0
// Attention of short new chunks over a long paged KV cache, on a CPU: what verifies drafts.
//
// vLLM's own kernel (csrc/cpu/cpu_attn_impl.hpp) splits the cache over the threads only for a single
// new token; with two it gives each KV head to one thread. Here the keys of all sequences and heads
// are laid in a row and every thread gets an equal, contiguous part of it, as the CUDA kernels do
// with thread blocks; the parts of one head are added up at the end.
#pragma once

#include <cstdint>

namespace stateful {

// One step. The cache is vLLM's for `vec` and `vec16` (cpu_attn_vec.hpp): for each block and KV head
// first K as [D, block_size], then V as [block_size, D]. The new K and V are in it already.
struct ChunkAttention {
  const void* q;    // [tokens, heads, D]
  void* out;        // [tokens, heads, D]
  const void* cache;
  const int32_t* block_table;  // [sequences, table_stride]
  const int32_t* query_start;  // [sequences + 1]
  const int32_t* seq_lens;     // [sequences], the new tokens included
  int64_t q_token, q_head, out_token, out_head;  // strides in elements, as the next line's
  int64_t cache_block, cache_head, table_stride;
  int32_t num_seqs, num_kv_heads, group_size, head_size, block_size;
  int32_t window;  // keys that a token sees, its own included; 0: all
  float scale, soft_cap;  // no cap: 0
};

// The keys [begin, end) of one sequence and KV head, for one thread.
struct Segment {
  int32_t seq, head, begin, end;
  int64_t place;  // of its maxima, sums and outputs in the workspace, in floats
};

// A chunk's keys are dealt out in multiples of this, within a block.
constexpr int kTileKeys = 128;

// Rows and keys of a sequence: `rows` are query tokens times the heads of a group.
inline int64_t num_rows(const ChunkAttention& step, int seq) {
  return int64_t(step.query_start[seq + 1] - step.query_start[seq]) * step.group_size;
}

// Floats in the workspace for a segment: a maximum and a sum for each row, and its output.
inline int64_t segment_floats(const ChunkAttention& step, int seq) {
  return num_rows(step, seq) * (2 + step.head_size);
}

// One instruction set's kernels; see chunk_attention.inc.
struct ChunkKernels {
  void (*attend)(const ChunkAttention&, const Segment&, float* workspace);
  // Adds up the segments of one sequence and head, which lie one behind the other.
  void (*combine)(const ChunkAttention&, const Segment* segments, int count,
                  const float* workspace);
};

// For float (0) or bfloat16 (1). Null where the CPU cannot run any.
const ChunkKernels* chunk_kernels(int is_bfloat16);

}  // namespace stateful
