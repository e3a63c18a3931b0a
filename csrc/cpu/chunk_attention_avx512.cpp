// SPDX-License-Identifier: Apache-2.0
#define ISA_NAMESPACE avx512
#include "chunk_attention.inc"
