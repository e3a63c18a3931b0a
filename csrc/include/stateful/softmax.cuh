// SPDX-License-Identifier: Apache-2.0
// Scores to weights, in the fragments that mma.m16n8k16 and wgmma share: a thread holds two rows
// (lane / 4, and 8 below it) and in each eight columns two neighbours, (lane % 4) * 2.
#pragma once
#include "parts.cuh"

namespace stateful {

// A block of keys: all cached, or all new.
struct KeyBlock {
  bool is_new;
  bool is_full;       // no key lies behind the end
  int32_t first;      // key of the sequence, or new token
  int32_t num_valid;  // of the block; 0: all of them lie behind the end
};

template <int kKeys>
STATEFUL_DEVICE KeyBlock key_block(const Tile& tile, int block) {
  KeyBlock b;
  int32_t end;
  b.is_new = block >= tile.num_cached_blocks;
  if (b.is_new) {
    b.first = (block - tile.num_cached_blocks) * kKeys;
    end = tile.num_new;
  } else {
    b.first = tile.first_key + block * kKeys;
    end = tile.end_key;
  }
  // Never compare num_valid with its bounds: ptxas gets that wrong (csrc/ptxas-vimnmx.md).
  b.is_full = b.first + kKeys <= end;
  b.num_valid = end - b.first;
  if (b.num_valid > kKeys) b.num_valid = kKeys;
  if (b.num_valid < 0) b.num_valid = 0;  // planned too long
  return b;
}

// Scale the scores to base 2 and hide what a row may not see.
//
// scale: of the products. step: of the thread's two rows, see MmaState. first_column: of scores[0]
// in the block.
template <int kKeys, int kTiles>
STATEFUL_DEVICE void mask_scores(const Params& p, const Tile& tile, const KeyBlock& b, float scale,
                                 const int32_t (&step)[2], int first_column, int lane,
                                 float (&scores)[kTiles][4]) {
  const bool all_seen = !b.is_new && b.is_full && p.window == 0;
  STATEFUL_UNROLL
  for (int n = 0; n < kTiles; ++n)
    STATEFUL_UNROLL
    for (int e = 0; e < 4; ++e) {
      float score = scores[n][e] * scale;
      if (p.soft_cap > 0.f) score = tanhf(score / p.soft_cap) * p.soft_cap * kLog2e;
      if (!all_seen) {
        const int column = first_column + n * 8 + (lane & 3) * 2 + (e & 1);
        const int key = b.first + column;
        const int self = b.is_new ? step[e >> 1] : tile.num_cached + step[e >> 1];
        bool seen = column < b.num_valid && key <= self;
        if (p.window > 0) seen = seen && key + p.window > self;
        if (!seen) score = -INFINITY;
      }
      scores[n][e] = score;
    }
}

// Online softmax: scores become weights under the new maximum of their row.
//
// most, total: of the row so far (total of this thread's columns only). kept: by what everything
// that was added up before has to be multiplied.
template <int kTiles>
STATEFUL_DEVICE void weigh_scores(float (&scores)[kTiles][4], float (&most)[2], float (&total)[2],
                                  float (&kept)[2]) {
  STATEFUL_UNROLL
  for (int h = 0; h < 2; ++h) {
    float high = most[h];
    STATEFUL_UNROLL
    for (int n = 0; n < kTiles; ++n)
      high = fmaxf(high, fmaxf(scores[n][2 * h], scores[n][2 * h + 1]));
    high = fmaxf(high, shuffle_xor(high, 1));
    high = fmaxf(high, shuffle_xor(high, 2));
    const float base = high == -INFINITY ? 0.f : high;
    kept[h] = exp2_fast(most[h] - base);
    most[h] = high;
    float sum = total[h] * kept[h];
    STATEFUL_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      scores[n][2 * h] = exp2_fast(scores[n][2 * h] - base);
      scores[n][2 * h + 1] = exp2_fast(scores[n][2 * h + 1] - base);
      sum += scores[n][2 * h] + scores[n][2 * h + 1];
    }
    total[h] = sum;
  }
}

template <int kTiles>
STATEFUL_DEVICE void scale_rows(float (&out)[kTiles][4], const float (&factor)[2]) {
  STATEFUL_UNROLL
  for (int i = 0; i < kTiles; ++i)
    STATEFUL_UNROLL
    for (int e = 0; e < 4; ++e) out[i][e] *= factor[e >> 1];
}

// The weights of 16 keys as the left operand of a product.
template <class T, int kTiles>
STATEFUL_DEVICE void pack_weights(const float (&weights)[kTiles][4], int k, uint32_t (&a)[4]) {
  a[0] = pack<T>(weights[2 * k][0], weights[2 * k][1]);
  a[1] = pack<T>(weights[2 * k][2], weights[2 * k][3]);
  a[2] = pack<T>(weights[2 * k + 1][0], weights[2 * k + 1][1]);
  a[3] = pack<T>(weights[2 * k + 1][2], weights[2 * k + 1][3]);
}

// Which token of its sequence's new tokens a row of the tile is; -1: no row.
template <int kRows>
STATEFUL_DEVICE int32_t step_of(const Params& p, const TileRows<kRows>& rows, int row) {
  const int unit = rows.unit[row];
  return unit < 0 ? -1 : (p.plan.units[unit].row0 + rows.row[row]) / p.group_size;
}

}  // namespace stateful
