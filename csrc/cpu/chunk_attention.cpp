// SPDX-License-Identifier: Apache-2.0
// torch.ops.vllm_stateful_cpu, over torch's stable ABI: one file for every Python and torch >= 2.10.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>

#include "chunk_attention.h"
#include "chunk_plan.h"

namespace stateful {

namespace avx2 {
extern const ChunkKernels kKernels[2];
}
namespace avx512 {
extern const ChunkKernels kKernels[2];
}

const ChunkKernels* chunk_kernels(int is_bfloat16) {
  const char* most = std::getenv("STATEFUL_CPU_ISA");  // for tests: avx2 where there is more
  const bool may_all = most == nullptr || std::strcmp(most, "avx2") != 0;
  if (may_all && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return &avx512::kKernels[is_bfloat16];
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return &avx2::kKernels[is_bfloat16];
  return nullptr;
}

}  // namespace stateful

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(bool fits, const char* what) {
  STD_TORCH_CHECK(fits, "vllm_stateful::chunk_attention: ", what);
}

const int32_t* ints(const Tensor& tensor, int64_t dims, const char* what) {
  check(tensor.scalar_type() == ScalarType::Int && tensor.dim() == dims &&
            tensor.stride(dims - 1) == 1,
        what);
  return static_cast<const int32_t*>(tensor.data_ptr());
}

stateful::ChunkAttention step_of(const Tensor& q, const Tensor& cache, Tensor& out,
                                 const Tensor& query_start, const Tensor& seq_lens,
                                 const Tensor& block_table) {
  check(q.dim() == 3 && out.dim() == 3 && cache.dim() == 4,
        "q and out have three dimensions, cache has four");
  const int64_t size = q.size(2), heads = cache.size(1), block = cache.size(2);
  check(heads > 0 && q.size(1) % heads == 0, "q heads must be a multiple of KV heads");
  check(size % 32 == 0 && block % 32 == 0 && cache.size(3) == 2 * size,
        "cache must be [blocks, KV heads, block, 2 D], block and D multiples of 32");
  check(out.size(0) == q.size(0) && out.size(1) == q.size(1) && out.size(2) == size,
        "out must have the shape of q");
  check(q.stride(2) == 1 && out.stride(2) == 1 && cache.stride(3) == 1 &&
            cache.stride(2) == 2 * size,
        "heads, and a block of one KV head, must be contiguous");
  check(out.scalar_type() == q.scalar_type() && cache.scalar_type() == q.scalar_type(),
        "all must have the dtype of q");
  stateful::ChunkAttention step{};
  step.query_start = ints(query_start, 1, "query_start must be [sequences + 1] int32");
  step.seq_lens = ints(seq_lens, 1, "seq_lens must be [sequences] int32");
  step.block_table = ints(block_table, 2, "block_table must be [sequences, blocks] int32");
  step.num_seqs = static_cast<int32_t>(query_start.size(0) - 1);
  check(step.num_seqs >= 0 && seq_lens.size(0) >= step.num_seqs &&
            block_table.size(0) >= step.num_seqs,
        "there must be a length and a row of blocks for each sequence");
  for (int seq = 0; seq < step.num_seqs; ++seq) {
    const int64_t tokens = step.query_start[seq + 1] - step.query_start[seq];
    check(tokens >= 0 && step.query_start[seq + 1] <= q.size(0), "query_start must not decrease");
    const int64_t length = step.seq_lens[seq];
    check(tokens == 0 || (tokens <= length && length <= block_table.size(1) * block),
          "a sequence must hold its new tokens, and its blocks must hold it");
  }
  step.q = q.data_ptr();
  step.out = out.data_ptr();
  step.cache = cache.data_ptr();
  step.q_token = q.stride(0);
  step.q_head = q.stride(1);
  step.out_token = out.stride(0);
  step.out_head = out.stride(1);
  step.cache_block = cache.stride(0);
  step.cache_head = cache.stride(1);
  step.table_stride = block_table.stride(0);
  step.num_kv_heads = static_cast<int32_t>(heads);
  step.group_size = static_cast<int32_t>(q.size(1) / heads);
  step.head_size = static_cast<int32_t>(size);
  step.block_size = static_cast<int32_t>(block);
  return step;
}

float* workspace(int64_t floats) {
  static thread_local std::vector<float> memory;  // of the thread that runs the model
  if (static_cast<int64_t>(memory.size()) < floats) memory.resize(floats);
  return memory.data();
}

void chunk_attention(const Tensor& q, const Tensor& cache, Tensor& out, const Tensor& query_start,
                     const Tensor& seq_lens, const Tensor& block_table, double scale,
                     double soft_cap, int64_t window) {
  stateful::ChunkAttention step =
      step_of(q, cache, out, query_start, seq_lens, block_table);
  step.scale = static_cast<float>(scale);
  step.soft_cap = static_cast<float>(soft_cap);
  step.window = static_cast<int32_t>(window);
  const bool is_bfloat16 = q.scalar_type() == ScalarType::BFloat16;
  check(is_bfloat16 || q.scalar_type() == ScalarType::Float, "q must be float32 or bfloat16");
  const stateful::ChunkKernels* kernels = stateful::chunk_kernels(is_bfloat16);
  check(kernels != nullptr, "this CPU has no AVX2");
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  const stateful::ChunkPlan plan = stateful::plan_chunks(step, threads);
  float* memory = workspace(plan.workspace_floats);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int i = plan.thread_begins[begin]; i < plan.thread_begins[end]; ++i)
      kernels->attend(step, plan.segments[i], memory);
  });
  const int64_t heads = static_cast<int64_t>(plan.head_begins.size()) - 1;
  torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      const int first = plan.head_begins[head], count = plan.head_begins[head + 1] - first;
      if (count > 0) kernels->combine(step, &plan.segments[first], count, memory);
    }
  });
}

bool is_supported() { return stateful::chunk_kernels(0) != nullptr; }

}  // namespace

STABLE_TORCH_LIBRARY(vllm_stateful_cpu, m) {
  m.def(
      "chunk_attention(Tensor q, Tensor cache, Tensor(a!) out, Tensor query_start, "
      "Tensor seq_lens, Tensor block_table, float scale, float soft_cap, int window) -> ()");
  m.def("is_supported() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_stateful_cpu, CPU, m) {
  m.impl("chunk_attention", TORCH_BOX(&chunk_attention));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_stateful_cpu, CompositeExplicitAutograd, m) {
  m.impl("is_supported", TORCH_BOX(&is_supported));
}
