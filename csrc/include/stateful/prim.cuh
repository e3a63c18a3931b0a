// SPDX-License-Identifier: Apache-2.0
// The instructions that both kernels are written in. csrc/emulator has the same ones for the host.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef STATEFUL_EMULATOR
#include "emulator.h"
#define STATEFUL_DEVICE inline
#define STATEFUL_GLOBAL inline void
#define STATEFUL_UNROLL
#define STATEFUL_NO_UNROLL
#else
#define STATEFUL_DEVICE __device__ __forceinline__
#define STATEFUL_GLOBAL __global__ void
#define STATEFUL_UNROLL _Pragma("unroll")
#define STATEFUL_NO_UNROLL _Pragma("unroll 1")
#endif

namespace stateful {

constexpr float kLog2e = 1.4426950408889634f;
constexpr int kWarp = 32;
constexpr int kChunk = 8;  // elements in 16 bytes

#ifndef STATEFUL_EMULATOR

STATEFUL_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

STATEFUL_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char stateful_smem[];
  return stateful_smem;
}

// 16 bytes from global to shared memory, or zeros. PTX ISA: cp.async.
STATEFUL_DEVICE void copy_async(void* to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes)
               : "memory");
}

STATEFUL_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int kPending>
STATEFUL_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

STATEFUL_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

STATEFUL_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c[16 x 8] += a[16 x 16] b[16 x 8]. PTX ISA: mma.m16n8k16, fragment layouts there.
template <class T>
STATEFUL_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
STATEFUL_DEVICE void mma<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
STATEFUL_DEVICE void mma<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

STATEFUL_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// 16 bytes of what nobody writes in this launch: such loads need not wait for stores before them.
STATEFUL_DEVICE uint4 load_constant(const void* from) {
  return __ldg(static_cast<const uint4*>(from));
}

// Past the first level cache, which does not see what other SMs have written.
STATEFUL_DEVICE float load_fresh(const float* from) { return __ldcg(from); }
STATEFUL_DEVICE float4 load_fresh(const float4* from) { return __ldcg(from); }

// For other SMs: seen there by who acquires what this CTA released.
STATEFUL_DEVICE void store_fresh(float* to, float value) { __stcg(to, value); }
STATEFUL_DEVICE void store_fresh(float2* to, float2 value) { __stcg(to, value); }
STATEFUL_DEVICE void store_fresh(float4* to, float4 value) { __stcg(to, value); }

// Around an atomic operation that says that something is written, or finds out. What other threads
// of the CTA wrote before a barrier in front of the first is released with it; what is behind a
// barrier after the second sees it. PTX ISA, "Memory Consistency Model": fences are cumulative.
STATEFUL_DEVICE void fence_release() { asm volatile("fence.acq_rel.gpu;\n" ::: "memory"); }
STATEFUL_DEVICE void fence_acquire() { asm volatile("fence.acq_rel.gpu;\n" ::: "memory"); }

STATEFUL_DEVICE uint32_t add_atomically(uint32_t* to, uint32_t value) {
  return atomicAdd(to, value);
}

STATEFUL_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

#endif  // STATEFUL_EMULATOR

template <class T>
STATEFUL_DEVICE uint32_t pack(float low, float high);

template <>
STATEFUL_DEVICE uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

template <>
STATEFUL_DEVICE uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

}  // namespace stateful
