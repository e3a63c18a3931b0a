// SPDX-License-Identifier: Apache-2.0
// The instructions of include/stateful/hopper.cuh on the host.
//
// A TMA copy happens at any time before its barrier's phase ends; a product of wgmma at once or
// when it is waited for. Operands are found through the descriptors' own bits, swizzle included.
#pragma once

namespace stateful {

constexpr int kDawdleRounds = 1000;

struct TensorMap {
  const unsigned char* base;
  int64_t sizes[4];    // columns, rows, heads, blocks
  int64_t strides[3];  // bytes: of rows, heads, blocks
};

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) -
                               emulator::current->cta->shared);
}

inline unsigned char* swizzled(emulator::Cta& cta, uint32_t address) {
  const uint32_t at = address ^ ((address >> 3) & 0x70);
  if (at + 2 > cta.shared_bytes) throw std::logic_error("an operand outside of shared memory");
  return cta.shared + at;
}

inline emulator::ByteBarrier& byte_barrier(uint64_t* barrier) {
  const auto found = emulator::current->cta->byte_barriers.find(barrier);
  if (found == emulator::current->cta->byte_barriers.end()) std::abort();
  return found->second;
}

inline void barrier_init(uint64_t* barrier, int count) {
  auto& b = emulator::current->cta->byte_barriers[barrier];
  b.count = b.pending = count;
}
inline void barrier_fence() {
  for (auto& [_, barrier] : emulator::current->cta->byte_barriers) barrier.is_fenced = true;
}
inline void barrier_expect(uint64_t* barrier, int bytes) {
  auto& b = byte_barrier(barrier);
  b.bytes += bytes;
  b.pending--;
  b.settle();
}
inline void barrier_arrive(uint64_t* barrier) {
  auto& b = byte_barrier(barrier);
  b.pending--;
  b.settle();
}
inline void barrier_wait(uint64_t* barrier, int parity) {
  auto& b = byte_barrier(barrier);
  while (b.phase == parity) emulator::yield();
}

inline void copy_box(void* to, const TensorMap* map, int column, int row, int head, int block,
                     uint64_t* barrier) {
  emulator::Cta& cta = *emulator::current->cta;
  auto& b = byte_barrier(barrier);
  if (!b.is_fenced) std::abort();
  auto* const base = static_cast<unsigned char*>(to);
  const int64_t from[4] = {column, row, head, block};
  cta.boxes.push_back([=, &cta, &b, map = *map] {
    for (int y = 0; y < kBoxRows; ++y)
      for (int x = 0; x < kBoxColumns; ++x) {
        const int64_t at[4] = {from[0] + x, from[1] + y, from[2], from[3]};
        uint16_t value = 0;
        bool inside = true;
        for (int d = 0; d < 4; ++d) inside = inside && at[d] >= 0 && at[d] < map.sizes[d];
        if (inside)
          memcpy(&value,
                 map.base + at[0] * 2 + at[1] * map.strides[0] + at[2] * map.strides[1] +
                     at[3] * map.strides[2],
                 2);
        const auto address = static_cast<uint32_t>(base - cta.shared) +
                             static_cast<uint32_t>(y * kBoxColumns + x) * 2;
        memcpy(swizzled(cta, address), &value, 2);
      }
    b.bytes -= kBoxBytes;
    b.settle();
  });
}

inline void store_for_async(void* to, uint4 value) {
  std::array<unsigned char, 16> bytes;
  memcpy(bytes.data(), &value, bytes.size());
  emulator::current->view.for_async.emplace_back(to, bytes);
}
inline void fence_shared_async() { emulator::current->view.fence_async(); }
inline void named_barrier(int name, int num_threads) {
  emulator::meet(emulator::current->cta->barriers[name], num_threads);
}
inline void join_lanes() { emulator::join_warp(); }
template <int kRegisters>
inline void fewer_registers() {}
template <int kRegisters>
inline void more_registers() {}
template <int kTiles>
inline void hold(float (&)[kTiles][4]) {}

inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::current->products.emplace_back(); }
// A lane now and then comes late, so that what must not happen before this has time to happen.
inline void dawdle() {
  if (emulator::random_bits() % 256) return;
  for (int i = 0; i < kDawdleRounds; ++i) emulator::yield();
}
template <int kPending>
inline void wgmma_wait() {
  dawdle();
  auto& groups = emulator::current->products;
  while (static_cast<int>(groups.size()) - 1 > kPending) {
    for (const auto& product : groups.front()) product();
    groups.erase(groups.begin());
  }
  emulator::join_warp();
}

// Now, if nothing before it waits, or later.
inline void do_product(std::function<void()> product) {
  auto& groups = emulator::current->products;
  bool none_waits = true;
  for (const auto& group : groups) none_waits = none_waits && group.empty();
  if (none_waits && (emulator::random_bits() & 1))
    product();
  else
    groups.back().push_back(std::move(product));
}

struct Operand {
  uint32_t start, leading, stride;
  explicit Operand(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) std::abort();
  }
  // Row (or column) n, reduction element k.
  uint32_t by_rows(int n, int k) const {
    return start + static_cast<uint32_t>(n / 8) * stride + static_cast<uint32_t>(n % 8 * 128 + k * 2);
  }
  uint32_t by_columns(int n, int k) const {
    return start + static_cast<uint32_t>(n / 64) * leading + static_cast<uint32_t>(n % 64 * 2) +
           static_cast<uint32_t>(k / 8) * stride + static_cast<uint32_t>(k % 8 * 128);
  }
};

template <class T>
float element(emulator::Cta& cta, uint32_t address) {
  T value;
  memcpy(static_cast<void*>(&value), swizzled(cta, address), 2);
  return static_cast<float>(value);
}

template <class T, int kTiles>
struct Wgmma {
  template <int kAll>
  static void shared(float (&c)[kAll][4], int first, uint64_t a, uint64_t b, bool add) {
    emulator::Cta& cta = *emulator::current->cta;
    const int lane = emulator::lane();
    const int row = emulator::current->index % kWarpgroup / kWarp * 16 + lane / 4;
    auto* const to = &c[first];
    do_product([=, &cta] {
      float rows[2][16];
      for (int k = 0; k < 16; ++k)
        for (int h = 0; h < 2; ++h)
          rows[h][k] = element<T>(cta, Operand(a).by_rows(row + 8 * h, k));
      multiply(to, rows, lane, add,
               [&](int n, int k) { return element<T>(cta, Operand(b).by_rows(n, k)); });
    });
  }

  template <int kAll>
  static void values(float (&c)[kAll][4], int first, const uint32_t (&a)[4], uint64_t b) {
    struct Fragment {
      uint32_t a[4];
    } mine{{a[0], a[1], a[2], a[3]}};
    emulator::Cta& cta = *emulator::current->cta;
    const int lane = emulator::lane();
    struct Rows {
      float at[2][16];
    } rows;
    emulator::exchange(mine, [&](auto theirs) {
      for (int k = 0; k < 16; ++k)
        for (int h = 0; h < 2; ++h)
          rows.at[h][k] = half_of<T>(theirs(lane / 4 * 4 + k % 8 / 2).a[h + 2 * (k >= 8)], k & 1);
      return 0;
    });
    auto* const to = &c[first];
    do_product([=, &cta] {
      multiply(to, rows.at, lane, true,
               [&](int n, int k) { return element<T>(cta, Operand(b).by_columns(n, k)); });
    });
  }

  template <class Right>
  static void multiply(float (*c)[4], const float (&rows)[2][16], int lane, bool add, Right right) {
    for (int i = 0; i < kTiles; ++i)
      for (int x = 0; x < 2; ++x) {
        float sum[2] = {add ? c[i][x] : 0.f, add ? c[i][2 + x] : 0.f};
        for (int k = 0; k < 16; ++k) {
          const float factor = right(i * 8 + lane % 4 * 2 + x, k);
          sum[0] += rows[0][k] * factor;
          sum[1] += rows[1][k] * factor;
        }
        c[i][x] = sum[0];
        c[i][2 + x] = sum[1];
      }
  }
};

}  // namespace stateful
