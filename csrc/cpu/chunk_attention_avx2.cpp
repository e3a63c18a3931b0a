// SPDX-License-Identifier: Apache-2.0
#define ISA_NAMESPACE avx2
#include "chunk_attention.inc"
