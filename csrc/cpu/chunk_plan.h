// SPDX-License-Identifier: Apache-2.0
// Which thread attends to which keys.
#pragma once

#include <algorithm>
#include <vector>

#include "chunk_attention.h"

namespace stateful {

// What a key costs beside its rows: reading it from memory, counted in rows.
constexpr int64_t kReadRows = 8;

struct ChunkPlan {
  std::vector<Segment> segments;        // by sequence, head and key
  std::vector<int32_t> thread_begins;   // [threads + 1]: the segments of each
  std::vector<int32_t> head_begins;     // [sequences * heads + 1]: those of each sequence and head
  int64_t workspace_floats = 0;
};

inline int first_key(const ChunkAttention& step, int seq) {
  const int tokens = step.query_start[seq + 1] - step.query_start[seq];
  if (step.window <= 0) return 0;
  const int seen = std::max(0, step.seq_lens[seq] - tokens - step.window + 1);
  return seen / kTileKeys * kTileKeys;
}

// Every key of every sequence and head in exactly one segment; threads get equal work, up to a tile.
// A sequence without new tokens, as padding is, has none, whatever its length says.
inline ChunkPlan plan_chunks(const ChunkAttention& step, int num_threads) {
  ChunkPlan plan;
  int64_t total = 0;
  for (int seq = 0; seq < step.num_seqs; ++seq)
    if (num_rows(step, seq) > 0)
      total += (step.seq_lens[seq] - first_key(step, seq)) * (kReadRows + num_rows(step, seq));
  total *= step.num_kv_heads;
  int64_t done = 0;
  int thread = 0;
  plan.thread_begins.push_back(0);
  plan.head_begins.push_back(0);
  for (int seq = 0; seq < step.num_seqs; ++seq) {
    const int64_t cost = kReadRows + num_rows(step, seq);
    const bool is_empty = num_rows(step, seq) == 0;
    for (int head = 0; head < step.num_kv_heads; ++head) {
      for (int key = first_key(step, seq); !is_empty && key < step.seq_lens[seq];) {
        // What this thread has left, at least one tile; the last takes all.
        const int64_t left = total * (thread + 1) / num_threads - done;
        const int64_t tiles = std::max<int64_t>(left / (cost * kTileKeys) + 1, 1);
        const int64_t rest = step.seq_lens[seq] - key;
        const bool takes_all = thread + 1 == num_threads || tiles * kTileKeys > rest;
        const int64_t keys = takes_all ? rest : tiles * kTileKeys;
        const int32_t end = key + static_cast<int32_t>(keys);
        plan.segments.push_back({seq, head, key, end, plan.workspace_floats});
        plan.workspace_floats += segment_floats(step, seq);
        done += keys * cost;
        key = end;
        while (thread + 1 < num_threads && done >= total * (thread + 1) / num_threads) {
          plan.thread_begins.push_back(static_cast<int32_t>(plan.segments.size()));
          ++thread;
        }
      }
      plan.head_begins.push_back(static_cast<int32_t>(plan.segments.size()));
    }
  }
  plan.thread_begins.resize(num_threads, static_cast<int32_t>(plan.segments.size()));
  plan.thread_begins.push_back(static_cast<int32_t>(plan.segments.size()));
  return plan;
}

}  // namespace stateful
