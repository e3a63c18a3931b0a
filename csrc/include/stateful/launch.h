// SPDX-License-Identifier: Apache-2.0
// The C interface between the kernels (nvcc, no torch) and the torch bindings (g++, no CUDA).
#pragma once
#include <cstdint>

#include "plan.cuh"

// What a kernel is chosen by. rows: of a tile; 16, 32, 64 (mma.sync) or 128 (wgmma, sm_90a).
struct StatefulKernel {
  int32_t is_half;  // of the result, 0: bfloat16
  int32_t is_fp8;   // the cache and the queries, 0: as the result
  int32_t head_size;
  int32_t rows;
  int32_t device;
};

// What TMA has to know beside the parameters.
struct StatefulSizes {
  int64_t num_blocks;
  int64_t num_tokens;
  int64_t num_kv_heads;
};

extern "C" {
// Each returns 0, or an error that stateful_error puts in words.
int stateful_launch(const StatefulKernel* kernel, const stateful::Params* params,
                    const StatefulSizes* sizes, int grid, void* stream);
// How many thread blocks are resident at once: the grid of the plan.
int stateful_num_ctas(const StatefulKernel* kernel, int* num_ctas);
int stateful_num_devices();
const char* stateful_error(int code);
}
