// SPDX-License-Identifier: Apache-2.0
// The instructions of include/stateful/prim.cuh on the host. Fragment layouts: PTX ISA, mma.m16n8k16.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace stateful {

inline unsigned char* shared_memory() { return emulator::current->cta->shared; }

inline void copy_async(void* to, const void* from, bool valid) {
  const emulator::Copy copy{to, from, valid};
  if (emulator::random_bits() & 1)
    copy.run();
  else
    emulator::current->copies.back().push_back(copy);
}

inline void copy_commit() { emulator::current->copies.emplace_back(); }

template <int kPending>
inline void copy_wait() {
  auto& groups = emulator::current->copies;
  while (static_cast<int>(groups.size()) - 1 > kPending) {
    for (const auto& copy : groups.front()) copy.run();
    groups.erase(groups.begin());
  }
}

inline void load_matrices_as(uint32_t (&r)[4], const void* row, bool transposed) {
  const int lane = emulator::lane();
  emulator::exchange(row, [&](auto theirs) {
    for (int i = 0; i < 4; ++i) {
      uint16_t pair[2];
      for (int k = 0; k < 2; ++k) {
        const int y = transposed ? (lane % 4) * 2 + k : lane / 4;
        const int x = transposed ? lane / 4 : (lane % 4) * 2 + k;
        memcpy(&pair[k], static_cast<const uint16_t*>(theirs(i * 8 + y)) + x, 2);
      }
      r[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
    return 0;
  });
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { load_matrices_as(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  load_matrices_as(r, row, true);
}

template <class T>
inline float half_of(uint32_t pair, int high) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * high));
  T value;
  memcpy(static_cast<void*>(&value), &bits, 2);
  return static_cast<float>(value);
}

template <class T>
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragment {
    uint32_t a[4], b[2];
  } mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const int lane = emulator::lane();
  emulator::exchange(mine, [&](auto theirs) {
    float rows[2][16], columns[2][16];
    for (int k = 0; k < 16; ++k)
      for (int h = 0; h < 2; ++h) {
        rows[h][k] =
            half_of<T>(theirs((lane / 4) * 4 + (k % 8) / 2).a[h + 2 * (k >= 8)], k & 1);
        columns[h][k] =
            half_of<T>(theirs(((lane % 4) * 2 + h) * 4 + (k % 8) / 2).b[k >= 8], k & 1);
      }
    for (int e = 0; e < 4; ++e)
      for (int k = 0; k < 16; ++k) c[e] += rows[e >> 1][k] * columns[e & 1][k];
    return 0;
  });
}

inline float shuffle_xor(float value, int mask) {
  const int other = emulator::lane() ^ mask;
  return emulator::exchange(value, [&](auto theirs) { return theirs(other); });
}

inline uint4 load_constant(const void* from) {
  uint4 value;
  memcpy(&value, from, sizeof(value));
  return value;
}

template <class V>
inline V load_fresh(const V* from) {
  return emulator::load(emulator::current->view, emulator::current->cta->told, from);
}
template <class V>
inline void store_fresh(V* to, V value) {
  emulator::store(emulator::current->view, to, value);
}
inline void fence_release() {
  emulator::flush(emulator::current->view.own);
  emulator::flush(emulator::current->cta->told.known);
}
inline void fence_acquire() { emulator::current->view.acquired = emulator::now; }

inline uint32_t add_atomically(uint32_t* to, uint32_t value) {
  const uint32_t before = *to;
  *to += value;
  return before;
}

inline float exp2_fast(float x) { return exp2f(x); }

}  // namespace stateful
