// SPDX-License-Identifier: Apache-2.0
// What only sm_90a has: TMA, mbarrier, wgmma, register reallocation. PTX ISA 8.0 and later.
#pragma once
#include "prim.cuh"

#ifndef STATEFUL_EMULATOR
#include <cuda.h>
#endif

namespace stateful {

constexpr int kWarpgroup = 128;
constexpr int kBoxRows = 16;     // rows of a TMA box: one page, or a part of one
constexpr int kBoxColumns = 64;  // 128 bytes, what the swizzle permutes
constexpr int kBoxBytes = kBoxRows * kBoxColumns * 2;
constexpr int kSwizzleRows = 8;
constexpr int kSwizzleBytes = kSwizzleRows * kBoxColumns * 2;

// An operand of wgmma in shared memory, 128-byte swizzle ("Matrix descriptor" in the PTX ISA).
//
// K-major (rows of 64 contiguous reduction elements): leading is unused, stride is between groups
// of eight rows. MN-major (rows of 64 contiguous columns): leading is between blocks of 64 columns,
// stride between groups of eight rows, which are eight reduction elements.
STATEFUL_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) |
         static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         static_cast<uint64_t>(1) << 62;
}

#ifdef STATEFUL_EMULATOR
}  // namespace stateful
#include "emulator_hopper.h"
namespace stateful {
#else

using TensorMap = CUtensorMap;

STATEFUL_DEVICE void barrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(count)
               : "memory");
}

// Make initialized barriers visible to the copies.
STATEFUL_DEVICE void barrier_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

STATEFUL_DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

STATEFUL_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier))
               : "memory");
}

// Wait until the phase of this parity has ended.
STATEFUL_DEVICE void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A box of 16 rows and 64 columns; what lies outside the tensor becomes zeros.
STATEFUL_DEVICE void copy_box(void* to, const TensorMap* map, int column, int row, int head,
                              int block, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(block)
      : "memory");
}

// For wgmma to read: seen by it behind fence_shared_async.
STATEFUL_DEVICE void store_for_async(void* to, uint4 value) {
  *reinterpret_cast<uint4*>(to) = value;
}

// Stores of this thread to shared memory come before later reads by TMA and wgmma.
STATEFUL_DEVICE void fence_shared_async() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

STATEFUL_DEVICE void named_barrier(int name, int num_threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(name), "r"(num_threads) : "memory");
}

STATEFUL_DEVICE void join_lanes() { __syncwarp(); }

template <int kRegisters>
STATEFUL_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

template <int kRegisters>
STATEFUL_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

STATEFUL_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
STATEFUL_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

template <int kPending>
STATEFUL_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Keep the compiler from moving reads of an accumulator across a wait.
template <int kTiles>
STATEFUL_DEVICE void hold(float (&c)[kTiles][4]) {
  STATEFUL_UNROLL
  for (int i = 0; i < kTiles; ++i)
    STATEFUL_UNROLL
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(c[i][e])::"memory");
}

#define STATEFUL_C4(c, i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define STATEFUL_C32(c, i)                                                                   \
  STATEFUL_C4(c, i), STATEFUL_C4(c, i + 1), STATEFUL_C4(c, i + 2), STATEFUL_C4(c, i + 3),    \
      STATEFUL_C4(c, i + 4), STATEFUL_C4(c, i + 5), STATEFUL_C4(c, i + 6), STATEFUL_C4(c, i + 7)
#define STATEFUL_R32(a, b, c, d)                                                           \
  "%" #a "0,%" #a "1,%" #a "2,%" #a "3,%" #a "4,%" #a "5,%" #a "6,%" #a "7,%" #a "8,%" #a "9," \
  "%" #b "0,%" #b "1,%" #b "2,%" #b "3,%" #b "4,%" #b "5,%" #b "6,%" #b "7,%" #b "8,%" #b "9," \
  "%" #c "0,%" #c "1,%" #c "2,%" #c "3,%" #c "4,%" #c "5,%" #c "6,%" #c "7,%" #c "8,%" #c "9,"
#define STATEFUL_D32 STATEFUL_R32(, 1, 2, 3) "%30,%31"
#define STATEFUL_D64                                                                       \
  STATEFUL_R32(, 1, 2, 3)                                                                  \
  STATEFUL_R32(3, 4, 5, 6) "%60,%61,%62,%63"

// c[64 x 8 kTiles] (+)= a[64 x 16] b[16 x 8 kTiles]; of 128 threads. `first` is the first tile
// of c, of which kTiles are written.
template <class T, int kTiles>
struct Wgmma;

#define STATEFUL_WGMMA(TYPE, NAME, TILES, SHAPE, D, C, A0, A1, A2, A3, A4)                       \
  template <>                                                                                  \
  struct Wgmma<TYPE, TILES> {                                                                  \
    template <int kAll>                                                                        \
    STATEFUL_DEVICE static void shared(float (&c)[kAll][4], int first, uint64_t a, uint64_t b, \
                                       bool add) {                                             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #A2 ", 0;\n"                            \
                   "wgmma.mma_async.sync.aligned." SHAPE ".f32." NAME "." NAME " {" D "}, %" #A0 \
                   ", %" #A1 ", p, 1, 1, 0, 0;\n}\n"                                           \
                   : C                                                                         \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)));                              \
    }                                                                                          \
    template <int kAll>                                                                        \
    STATEFUL_DEVICE static void values(float (&c)[kAll][4], int first, const uint32_t (&a)[4], \
                                       uint64_t b) {                                           \
      asm volatile("wgmma.mma_async.sync.aligned." SHAPE ".f32." NAME "." NAME " {" D "}, {%" #A0 \
                   ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #A4 ", 1, 1, 1, 1;\n"                      \
                   : C                                                                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                      \
    }                                                                                          \
  };

#define STATEFUL_WGMMA_TYPE(TYPE, NAME)                                                            \
  STATEFUL_WGMMA(TYPE, NAME, 8, "m64n64k16", STATEFUL_D32, STATEFUL_C32(c, first), 32, 33, 34, 35, \
                 36)                                                                               \
  STATEFUL_WGMMA(TYPE, NAME, 16, "m64n128k16", STATEFUL_D64,                                       \
                 STATEFUL_C32(c, first) STATEFUL_COMMA STATEFUL_C32(c, first + 8), 64, 65, 66, 67, \
                 68)
#define STATEFUL_COMMA ,

STATEFUL_WGMMA_TYPE(__nv_bfloat16, "bf16")
STATEFUL_WGMMA_TYPE(__half, "f16")

#endif  // STATEFUL_EMULATOR

}  // namespace stateful
