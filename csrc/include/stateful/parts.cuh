// SPDX-License-Identifier: Apache-2.0
// The sum over the parts of a unit, in the launch that makes them.
//
// Parts are added up in a tree: whoever comes last to a node of up to kFanIn parts puts their sum
// in the place of the first one, and goes on to the node above. Nobody waits for anybody. A thread
// block reads kFanIn parts at a level, all of them at once: one alone would draw 33 parts of 64
// rows (1 MB) through one SM.
#pragma once
#include "tile.cuh"

namespace stateful {

#ifndef STATEFUL_FAN_IN
#define STATEFUL_FAN_IN 8
#endif
constexpr int kFanIn = STATEFUL_FAN_IN;
constexpr int kRowsAtOnce = 16 / kFanIn > 0 ? 16 / kFanIn : 1;  // of a thread: 16 loads in flight

// A node of a unit's tree. Its children are `stride` parts apart; their sums stand in the place of
// the first part of each.
struct Node {
  int32_t index;   // at its level
  int32_t stride;  // kFanIn to the power of the level
  int32_t below;   // nodes, or parts, of the level below

  STATEFUL_DEVICE int first_part() const { return index * kFanIn * stride; }
  STATEFUL_DEVICE int num_children() const {
    const int rest = below - index * kFanIn;
    return rest < kFanIn ? rest : kFanIn;
  }
  STATEFUL_DEVICE bool is_root() const { return below <= kFanIn; }
  STATEFUL_DEVICE Node above() const {
    return Node{index / kFanIn, stride * kFanIn, (below + kFanIn - 1) / kFanIn};
  }
};

STATEFUL_DEVICE Node node_of_part(const Unit& unit, int part) {
  return Node{part / kFanIn, 1, unit.num_parts};
}

// Say that a child of this node is written. One thread, behind a barrier of all that wrote it.
//
// Returns whether it was the last one: then the others can be read, behind a barrier again. The
// counter of a node is that of the first part of its second child, which no other node has; it is
// left at zero.
STATEFUL_DEVICE bool arrive(const Params& p, const Unit& unit, const Node& node) {
  const int num_children = node.num_children();
  if (num_children == 1) return true;
  uint32_t* const counter = p.arrivals + unit.slot + node.first_part() + node.stride;
  fence_release();
  const bool last = add_atomically(counter, 1u) + 1u == static_cast<uint32_t>(num_children);
  fence_acquire();
  if (last) *counter = 0;  // for the next launch
  return last;
}

// What the parts of one row weigh.
struct PartWeights {
  float of[kFanIn];
  float inverse;  // of their sum; 0: no key was visible to this row
  float lse;      // of all of them, base 2
};

STATEFUL_DEVICE PartWeights weigh_parts(const float (&lse)[kFanIn]) {
  PartWeights weights;
  float most = lse[0], total = 0.f;
  STATEFUL_UNROLL
  for (int k = 1; k < kFanIn; ++k) most = fmaxf(most, lse[k]);
  const float base = most == -INFINITY ? 0.f : most;
  STATEFUL_UNROLL
  for (int k = 0; k < kFanIn; ++k) {
    weights.of[k] = exp2_fast(lse[k] - base);
    total += weights.of[k];
  }
  weights.inverse = total > 0.f ? 1.f / total : 0.f;
  weights.lse = total > 0.f ? base + log2f(total) : -INFINITY;
  return weights;
}

// Sum the children of a node: into the result, or into the place of the first one.
template <class T, int D, int kRows, class Sync>
STATEFUL_DEVICE void sum_children(const Params& p, const Unit& unit, const Node& node, int thread,
                                  int num_threads, Sync sync) {
  constexpr int kChunks = D / 4;
  const int num_children = node.num_children(), num_rows = rows_of<kRows>(p, unit);
  const int64_t first = (static_cast<int64_t>(unit.slot) + node.first_part()) * kRows;
  const int64_t step = static_cast<int64_t>(node.stride) * kRows;
  const auto load_lse = [&](int row, float(&lse)[kFanIn]) {
    STATEFUL_UNROLL
    for (int k = 0; k < kFanIn; ++k)
      lse[k] = k < num_children && row < num_rows
                   ? load_fresh(p.partial_lse + first + k * step + row)
                   : -INFINITY;
  };
  const int num_items = num_rows * kChunks;
  for (int begin = thread; begin < num_items; begin += num_threads * kRowsAtOnce) {
    float4 value[kRowsAtOnce][kFanIn];
    float lse[kRowsAtOnce][kFanIn];
    STATEFUL_UNROLL
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const int item = begin + j * num_threads, row = item / kChunks;
      load_lse(row, lse[j]);
      STATEFUL_UNROLL
      for (int k = 0; k < kFanIn; ++k) {
        value[j][k] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (k < num_children && row < num_rows)
          value[j][k] = load_fresh(reinterpret_cast<const float4*>(
              p.partial_out + (first + k * step + row) * D + item % kChunks * 4));
      }
    }
    STATEFUL_UNROLL
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const int item = begin + j * num_threads, row = item / kChunks, column = item % kChunks * 4;
      if (row >= num_rows) break;
      const PartWeights weights = weigh_parts(lse[j]);
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
      STATEFUL_UNROLL
      for (int k = 0; k < kFanIn; ++k) {
        const float weight = weights.of[k] * weights.inverse;
        if (weight == 0.f) continue;  // nothing of it was visible to this row
        sum.x += weight * value[j][k].x;
        sum.y += weight * value[j][k].y;
        sum.z += weight * value[j][k].z;
        sum.w += weight * value[j][k].w;
      }
      if (node.is_root())
        store4<T>(out_row<T>(p, unit, row) + column, sum);
      else
        store_fresh(reinterpret_cast<float4*>(p.partial_out + (first + row) * D + column), sum);
    }
  }
  if (node.is_root()) return;
  sync();  // all have read what is written now
  for (int row = thread; row < num_rows; row += num_threads) {
    float lse[kFanIn];
    load_lse(row, lse);
    store_fresh(p.partial_lse + first + row, weigh_parts(lse).lse);
  }
}

// Say that this segment's part is written, and sum what is complete with it. Every thread of those
// that `sync` joins calls this, after its stores.
template <class T, int D, int kRows, class Sync>
STATEFUL_DEVICE void finish(const Params& p, const Tile& tile, TileRows<kRows>& rows, int thread,
                            int num_threads, Sync sync) {
  sync();
  for (int i = thread; i < tile.num_members; i += num_threads) {
    const Unit unit = p.plan.units[member_of(p, tile, i).unit];
    rows.is_last[i] =
        unit.num_parts > 1 && arrive(p, unit, node_of_part(unit, tile.segment.part));
  }
  sync();
  for (int i = 0; i < tile.num_members; ++i) {
    if (!rows.is_last[i]) continue;
    const Unit unit = p.plan.units[member_of(p, tile, i).unit];
    Node node = node_of_part(unit, tile.segment.part);
    while (true) {
      if (node.num_children() > 1)
        sum_children<T, D, kRows>(p, unit, node, thread, num_threads, sync);
      if (node.is_root()) break;
      node = node.above();
      sync();
      if (thread == 0) rows.is_last[i] = arrive(p, unit, node);
      sync();
      if (!rows.is_last[i]) break;
    }
  }
}

}  // namespace stateful
