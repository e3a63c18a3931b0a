// SPDX-License-Identifier: Apache-2.0
// torch.ops.vllm_stateful, over torch's stable ABI: one file for every Python and torch >= 2.10.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>

#include "stateful/launch.h"

// Null in builds of torch without CUDA, which could otherwise not load this library.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(bool fits, const char* what) {
  STD_TORCH_CHECK(fits, "vllm_stateful::delta_append_attention: ", what);
}

void check_ints(const Tensor& tensor, int64_t width, const char* name, int32_t device) {
  const bool fits = tensor.get_device_index() == device && tensor.scalar_type() == ScalarType::Int && tensor.is_contiguous() &&
                    (width == 0 || (tensor.dim() == 2 && tensor.size(1) == width));
  STD_TORCH_CHECK(fits, "vllm_stateful::delta_append_attention: ", name,
                  " must be contiguous int32 of its documented shape, on the device of q");
}

const int32_t* ints(const Tensor& tensor) {
  return static_cast<const int32_t*>(tensor.data_ptr());
}

template <class Structure>
const Structure* structures(const Tensor& tensor) {
  return static_cast<const Structure*>(tensor.data_ptr());
}

int is_half(const Tensor& out) {
  const bool half = out.scalar_type() == ScalarType::Half;
  check(half || out.scalar_type() == ScalarType::BFloat16, "out must be bfloat16 or float16");
  return half;
}

int is_fp8(const Tensor& cache) { return cache.scalar_type() == ScalarType::Float8_e4m3fn; }

// A scale of all heads, or of each; null where nothing is scaled.
const float* scale_of(const Tensor& scale, const Tensor& cache, int64_t heads) {
  if (!is_fp8(cache)) {
    check(scale.numel() == 0, "scales are for an fp8 cache");
    return nullptr;
  }
  check(scale.scalar_type() == ScalarType::Float && scale.is_contiguous() &&
            (scale.numel() == 1 || scale.numel() == heads) &&
            scale.get_device_index() == cache.get_device_index(),
        "a scale must be float32, one or one for each KV head, on the device of the cache");
  return static_cast<const float*>(scale.data_ptr());
}

void* current_stream(int device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "vllm_stateful: this build of torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0,
                  "vllm_stateful: no current CUDA stream");
  return stream;
}

void check_tensors(const Tensor& q, const Tensor& k_new, const Tensor& v_new, const Tensor& cache,
                   const Tensor& out) {
  check(q.dim() == 3 && k_new.dim() == 3 && v_new.dim() == 3 && out.dim() == 3 && cache.dim() == 4,
        "q, k_new, v_new and out have three dimensions, cache has four");
  const int64_t tokens = q.size(0), size = q.size(2), heads = k_new.size(1);
  check(heads > 0 && q.size(1) % heads == 0, "q heads must be a multiple of KV heads");
  check(k_new.size(0) == tokens && v_new.size(0) == tokens && out.size(0) == tokens,
        "q, k_new, v_new and out must have as many tokens");
  check(k_new.size(2) == size && v_new.size(2) == size && v_new.size(1) == heads &&
            out.size(1) == q.size(1) && out.size(2) == size,
        "q, k_new, v_new and out must fit each other");
  check(cache.size(1) == heads && cache.size(3) == 2 * size && cache.size(2) % 16 == 0,
        "cache must be [blocks, KV heads, page, 2 D], the page a multiple of 16");
  for (const Tensor* each : {&q, &k_new, &v_new, &cache, &out}) {
    const bool reduced = is_fp8(cache) && (each == &q || each == &cache);
    check(each->stride(each->dim() - 1) == 1, "the last dimension must be contiguous");
    check(each->scalar_type() == (reduced ? ScalarType::Float8_e4m3fn : out.scalar_type()),
          "all must have the dtype of out; q that of the cache where this is fp8 (e4m3)");
    check(each->get_device_index() == q.get_device_index(), "all must be on one device");
    check(reinterpret_cast<uintptr_t>(each->data_ptr()) % 16 == 0, "addresses must be aligned");
    for (int64_t i = 0; i + 1 < each->dim(); ++i)
      check(each->stride(i) % (reduced ? 16 : 8) == 0, "strides must be multiples of 16 bytes");
  }
}

void delta_append_attention(const Tensor& q, const Tensor& k_new, const Tensor& v_new,
                            Tensor& cache, Tensor& out, const Tensor& block_table,
                            const Tensor& query_start, const Tensor& seq_lens,
                            const Tensor& slot_mapping, const Tensor& cta_segments,
                            const Tensor& segments, const Tensor& units, const Tensor& groups,
                            const Tensor& members, Tensor& partial_out, Tensor& partial_lse,
                            Tensor& arrivals, const Tensor& q_scale, const Tensor& k_scale,
                            const Tensor& v_scale, int64_t rows, double scale, double soft_cap,
                            int64_t window) {
  check_tensors(q, k_new, v_new, cache, out);
  const int32_t device = q.get_device_index();
  check_ints(cta_segments, 0, "cta_segments", device);
  check_ints(segments, 8, "segments", device);
  check_ints(units, 8, "units", device);
  check_ints(groups, 4, "groups", device);
  check_ints(members, 2, "members", device);
  check_ints(query_start, 0, "query_start", device);
  check_ints(seq_lens, 0, "seq_lens", device);
  check_ints(arrivals, 0, "arrivals", device);
  for (const Tensor* each : std::initializer_list<const Tensor*>{&block_table, &slot_mapping,
                                                                 &partial_out, &partial_lse})
    check(each->get_device_index() == device, "all must be on one device");
  check(block_table.scalar_type() == ScalarType::Int && block_table.dim() == 2 &&
            block_table.stride(1) == 1,
        "block_table must be int32 [sequences, pages]");
  check(slot_mapping.scalar_type() == ScalarType::Long && slot_mapping.is_contiguous() &&
            slot_mapping.numel() >= q.size(0),
        "slot_mapping must be contiguous int64, one for each token");
  check(partial_out.scalar_type() == ScalarType::Float && partial_out.is_contiguous() &&
            partial_lse.scalar_type() == ScalarType::Float && partial_lse.is_contiguous() &&
            partial_out.numel() == partial_lse.numel() * q.size(2),
        "partial_out and partial_lse must be contiguous float32, [slots, rows, D] and "
        "[slots, rows]");
  check(arrivals.numel() * rows >= partial_lse.numel(), "arrivals must have a counter for each slot");
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  stateful::Params p{};
  p.plan = {ints(cta_segments), structures<stateful::Segment>(segments),
            structures<stateful::Unit>(units), structures<stateful::Group>(groups),
            structures<stateful::Member>(members)};
  p.q = q.data_ptr();
  p.k_new = k_new.data_ptr();
  p.v_new = v_new.data_ptr();
  p.out = out.data_ptr();
  p.cache = cache.data_ptr();
  p.partial_out = static_cast<float*>(partial_out.data_ptr());
  p.partial_lse = static_cast<float*>(partial_lse.data_ptr());
  p.arrivals = static_cast<uint32_t*>(arrivals.data_ptr());
  p.block_table = ints(block_table);
  p.query_start = ints(query_start);
  p.seq_lens = ints(seq_lens);
  p.slot_mapping = static_cast<const int64_t*>(slot_mapping.data_ptr());
  p.q_scale = scale_of(q_scale, cache, k_new.size(1));
  p.k_scale = scale_of(k_scale, cache, k_new.size(1));
  p.v_scale = scale_of(v_scale, cache, k_new.size(1));
  p.q_scale_head = q_scale.numel() > 1;
  p.k_scale_head = k_scale.numel() > 1;
  p.v_scale_head = v_scale.numel() > 1;
  p.q_token = q.stride(0);
  p.q_head = q.stride(1);
  p.k_token = k_new.stride(0);
  p.k_head = k_new.stride(1);
  p.v_token = v_new.stride(0);
  p.v_head = v_new.stride(1);
  p.out_token = out.stride(0);
  p.out_head = out.stride(1);
  p.cache_block = cache.stride(0);
  p.cache_head = cache.stride(1);
  p.cache_token = cache.stride(2);
  p.cache_v = q.size(2);
  p.group_size = static_cast<int32_t>(q.size(1) / k_new.size(1));
  p.page_size = static_cast<int32_t>(cache.size(2));
  p.table_stride = static_cast<int32_t>(block_table.stride(0));
  p.window = static_cast<int32_t>(window);
  p.scale = static_cast<float>(soft_cap > 0 ? scale : scale * 1.4426950408889634);
  p.soft_cap = static_cast<float>(soft_cap);
  const StatefulKernel kernel = {is_half(out), is_fp8(cache), static_cast<int32_t>(q.size(2)),
                                 static_cast<int32_t>(rows), q.get_device_index()};
  const StatefulSizes sizes = {cache.size(0), q.size(0), k_new.size(1)};
  const int code = stateful_launch(&kernel, &p, &sizes, static_cast<int>(cta_segments.numel() - 1),
                                   current_stream(q.get_device_index()));
  STD_TORCH_CHECK(code == 0, "vllm_stateful::delta_append_attention: ", stateful_error(code));
}

int64_t num_ctas(bool half, bool fp8, int64_t head_size, int64_t rows, int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  const StatefulKernel kernel = {half, fp8, static_cast<int32_t>(head_size),
                                 static_cast<int32_t>(rows), static_cast<int32_t>(device)};
  int count = 0;
  const int code = stateful_num_ctas(&kernel, &count);
  STD_TORCH_CHECK(code == 0, "vllm_stateful::num_ctas: ", stateful_error(code));
  return count;
}

int64_t num_devices() { return stateful_num_devices(); }

}  // namespace

STABLE_TORCH_LIBRARY(vllm_stateful, m) {
  m.def(
      "delta_append_attention(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) cache, "
      "Tensor(b!) out, Tensor block_table, Tensor query_start, Tensor seq_lens, "
      "Tensor slot_mapping, Tensor cta_segments, Tensor segments, Tensor units, Tensor groups, "
      "Tensor members, Tensor(c!) partial_out, Tensor(d!) partial_lse, Tensor(e!) arrivals, "
      "Tensor q_scale, Tensor k_scale, Tensor v_scale, "
      "int rows, float scale, float soft_cap, int window) -> ()");
  m.def("num_ctas(bool half, bool fp8, int head_size, int rows, int device) -> int");
  m.def("num_devices() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_stateful, CUDA, m) {
  m.impl("delta_append_attention", TORCH_BOX(&delta_append_attention));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_stateful, CompositeExplicitAutograd, m) {
  m.impl("num_ctas", TORCH_BOX(&num_ctas));
  m.impl("num_devices", TORCH_BOX(&num_devices));
}
