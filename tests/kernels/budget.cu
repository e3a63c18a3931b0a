// SPDX-License-Identifier: Apache-2.0
// The kernels of one head size, to be compiled by tests/kernels/test_compiled.py.
#include "stateful/delta_append_mma.cuh"
#include "stateful/delta_append_wgmma.cuh"

using namespace stateful;

#define MMA(TILE) template __global__ void stateful::delta_append_mma<TILE>(const Params)
using T16 = Mma16<__nv_bfloat16, 128>;
using T32 = Mma32<__nv_bfloat16, 128>;
using T64 = Mma64<__nv_bfloat16, 128>;
#ifdef STATEFUL_FP8
using F16 = Mma16<__nv_bfloat16, 128, Fp8>;
using F32 = Mma32<__nv_bfloat16, 128, Fp8>;
using F64 = Mma64<__nv_bfloat16, 128, Fp8>;
MMA(F16);
MMA(F32);
MMA(F64);
#endif
MMA(T16);
MMA(T32);
MMA(T64);
template __global__ void stateful::delta_append_wgmma<WgmmaShape<__nv_bfloat16, 128>>(
    const __grid_constant__ Params, const __grid_constant__ TensorMaps);
