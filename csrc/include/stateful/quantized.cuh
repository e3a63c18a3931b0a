// SPDX-License-Identifier: Apache-2.0
// A KV cache of eight bits an element, e4m3: reading is exact in half, writing rounds as vLLM does.
#pragma once
#include <cuda_fp8.h>

#include "plan.cuh"
#include "prim.cuh"

namespace stateful {

struct Fp8 {
  uint8_t bits;
};

template <class C>
constexpr bool kIsFp8 = false;
template <>
constexpr bool kIsFp8<Fp8> = true;

// Four neighbours as two pairs of halves.
STATEFUL_DEVICE void expand(uint32_t four, uint32_t& low, uint32_t& high) {
  const __half2_raw first =
      __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(four & 0xffff), __NV_E4M3);
  const __half2_raw second =
      __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(four >> 16), __NV_E4M3);
  memcpy(&low, &first, 4);
  memcpy(&high, &second, 4);
}

// Bytes 0, 2, 1, 3.
STATEFUL_DEVICE uint32_t by_parity(uint32_t four) {
  return (four & 0xff0000ffu) | (four & 0x0000ff00u) << 8 | (four & 0x00ff0000u) >> 8;
}

// Eight elements, divided by `scale` and rounded; what is too large becomes the largest there is.
// As vLLM's reshape_and_cache_flash (csrc/quantization/w8a8/fp8/nvidia/quant_utils.cuh).
template <class T>
STATEFUL_DEVICE uint2 quantize(const T* from, float scale) {
  const uint4 loaded = load_constant(from);
  T values[8];
  memcpy(static_cast<void*>(values), &loaded, 16);
  uint2 eight = make_uint2(0, 0);
  STATEFUL_UNROLL
  for (int i = 0; i < 8; ++i) {
    const uint32_t one = __nv_cvt_float_to_fp8(static_cast<float>(values[i]) / scale,
                                               __NV_SATFINITE, __NV_E4M3);
    (i < 4 ? eight.x : eight.y) |= one << (8 * (i & 3));
  }
  return eight;
}

// Eight elements of a new K or V as the cache has them.
template <class T, class C>
STATEFUL_DEVICE void store_cached(C* to, const T* from, const float* scale) {
  if constexpr (kIsFp8<C>)
    *reinterpret_cast<uint2*>(to) = quantize(from, *scale);
  else
    *reinterpret_cast<uint4*>(to) = load_constant(from);
}

// What one unit of the products of a KV head's queries and keys stands for, times p.scale.
template <class C>
STATEFUL_DEVICE float score_scale(const Params& p, int head) {
  if constexpr (kIsFp8<C>)
    return p.scale * p.q_scale[head * p.q_scale_head] * p.k_scale[head * p.k_scale_head];
  else
    return p.scale;
}

template <class C>
STATEFUL_DEVICE float value_scale(const Params& p, int head) {
  if constexpr (kIsFp8<C>)
    return p.v_scale[head * p.v_scale_head];
  else
    return 1.f;
}

}  // namespace stateful
