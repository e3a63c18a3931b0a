// SPDX-License-Identifier: Apache-2.0
// Launches the kernels; the only file that nvcc compiles.
#include <cuda_runtime.h>

#include "stateful/delta_append_mma.cuh"
#include "stateful/delta_append_wgmma.cuh"
#include "stateful/launch.h"

namespace {

using stateful::Params;
using stateful::TensorMap;
using stateful::TensorMaps;

constexpr int kUnknownKernel = -1;
constexpr int kNoTensorMaps = -2;
constexpr int kBadTensorMap = -3;

// One kernel: its code, its threads, its shared memory.
struct Built {
  const void* code = nullptr;
  int threads = 0;
  int shared_bytes = 0;
  bool uses_tma = false;
};

template <class S>
Built mma_kernel() {
  return {reinterpret_cast<const void*>(&stateful::delta_append_mma<S>), S::kThreads,
          S::kSharedBytes, false};
}

template <class T, int D>
Built wgmma_kernel() {
  using S = stateful::WgmmaShape<T, D>;
  return {reinterpret_cast<const void*>(&stateful::delta_append_wgmma<S>), S::kThreads,
          S::kSharedBytes, true};
}

// C: of the cache; T, or Fp8, which kernel B does not know.
template <class T, class C, int D>
Built choose_rows(int rows) {
  switch (rows) {
    case 16: return mma_kernel<stateful::Mma16<T, D, C>>();
    case 32: return mma_kernel<stateful::Mma32<T, D, C>>();
    case 64: return mma_kernel<stateful::Mma64<T, D, C>>();
    case 128:
      if constexpr (!stateful::kIsFp8<C>) return wgmma_kernel<T, D>();
      return {};
    default: return {};
  }
}

template <class T, class C>
Built choose_head_size(const StatefulKernel& kernel) {
  switch (kernel.head_size) {
    case 64: return choose_rows<T, C, 64>(kernel.rows);
    case 128: return choose_rows<T, C, 128>(kernel.rows);
    case 256: return choose_rows<T, C, 256>(kernel.rows);
    default: return {};
  }
}

template <class T>
Built choose_cache(const StatefulKernel& kernel) {
  return kernel.is_fp8 ? choose_head_size<T, stateful::Fp8>(kernel)
                       : choose_head_size<T, T>(kernel);
}

Built choose(const StatefulKernel& kernel) {
  return kernel.is_half ? choose_cache<__half>(kernel) : choose_cache<__nv_bfloat16>(kernel);
}

// wgmma is in the code of sm_90a only.
bool runs_on(const Built& built, int device) {
  if (built.code == nullptr || !built.uses_tma) return built.code != nullptr;
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major == 9;
}

cudaError_t allow_shared_memory(const Built& built) {
  return cudaFuncSetAttribute(built.code, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              built.shared_bytes);
}

// The driver's encoder, found at run time: this library is loaded where no driver is.
decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) found = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return encode;
}

struct Extent {
  int64_t columns, rows, heads, blocks;
  int64_t row, head, block;  // strides in elements
};

bool encode(TensorMap* map, const void* base, const Extent& e, bool is_half) {
  const cuuint64_t sizes[4] = {cuuint64_t(e.columns), cuuint64_t(e.rows), cuuint64_t(e.heads),
                               cuuint64_t(e.blocks)};
  const cuuint64_t strides[3] = {cuuint64_t(e.row) * 2, cuuint64_t(e.head) * 2,
                                 cuuint64_t(e.block) * 2};
  const cuuint32_t box[4] = {stateful::kBoxColumns, stateful::kBoxRows, 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  return tensor_map_encoder()(map,
                              is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                      : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                              4, const_cast<void*>(base), sizes, strides, box, steps,
                              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

int make_maps(const StatefulKernel& kernel, const Params& p, const StatefulSizes& s,
              TensorMaps* maps) {
  if (tensor_map_encoder() == nullptr) return kNoTensorMaps;
  const int64_t d = kernel.head_size, heads = s.num_kv_heads;
  // A dimension of one element still needs a stride that is a multiple of 16 bytes.
  const Extent cache = {2 * d,         p.page_size,  heads,        s.num_blocks,
                        p.cache_token, p.cache_head, p.cache_block};
  const Extent k = {d, s.num_tokens, heads, 1, p.k_token, p.k_head, p.k_token};
  const Extent v = {d, s.num_tokens, heads, 1, p.v_token, p.v_head, p.v_token};
  const bool done = encode(&maps->cache, p.cache, cache, kernel.is_half) &&
                    encode(&maps->k_new, p.k_new, k, kernel.is_half) &&
                    encode(&maps->v_new, p.v_new, v, kernel.is_half);
  return done ? 0 : kBadTensorMap;
}

}  // namespace

extern "C" int stateful_launch(const StatefulKernel* kernel, const Params* params,
                               const StatefulSizes* sizes, int grid, void* stream) {
  const Built built = choose(*kernel);
  if (!runs_on(built, kernel->device)) return kUnknownKernel;
  if (const cudaError_t error = allow_shared_memory(built)) return error;
  TensorMaps maps;
  if (built.uses_tma)
    if (const int error = make_maps(*kernel, *params, *sizes, &maps)) return error;
  void* arguments[] = {const_cast<Params*>(params), &maps};
  return cudaLaunchKernel(built.code, dim3(grid), dim3(built.threads), arguments,
                          built.shared_bytes, static_cast<cudaStream_t>(stream));
}

extern "C" int stateful_num_ctas(const StatefulKernel* kernel, int* num_ctas) {
  const Built built = choose(*kernel);
  if (!runs_on(built, kernel->device)) return kUnknownKernel;
  int num_sms = 0, of_one = 0;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, kernel->device))
    return error;
  if (const cudaError_t error = allow_shared_memory(built)) return error;
  if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &of_one, built.code, built.threads, built.shared_bytes))
    return error;
  *num_ctas = num_sms * of_one;
  return of_one ? 0 : kUnknownKernel;
}

extern "C" int stateful_num_devices() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

extern "C" const char* stateful_error(int code) {
  switch (code) {
    case kUnknownKernel: return "no kernel for this dtype, head size and tile on this device";
    case kNoTensorMaps: return "the driver does not know cuTensorMapEncodeTiled";
    case kBadTensorMap: return "cuTensorMapEncodeTiled refused the strides or the addresses";
    default: return cudaGetErrorString(static_cast<cudaError_t>(code));
  }
}
