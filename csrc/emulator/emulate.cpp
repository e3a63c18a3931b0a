// SPDX-License-Identifier: Apache-2.0
// The kernels on the host, behind a C interface: tests/kernels/emulator.py loads it.
#define STATEFUL_EMULATOR
#include "stateful/delta_append_mma.cuh"
#include "stateful/delta_append_wgmma.cuh"

using stateful::Params;

namespace {

struct Options {
  int32_t grid;
  int32_t most_alive;  // CTAs at a time
  uint64_t seed;
  int32_t num_kv_heads;
  int32_t num_tokens;
  int32_t num_blocks;
  int32_t is_fp8;  // the cache, and q
};

template <class S>
void run_mma(const Params& params, const Options& options) {
  emulator::random_state = options.seed * 2654435761u + 1;
  emulator::launch(options.grid, S::kThreads, S::kSharedBytes, options.most_alive,
                   [&] { stateful::delta_append_mma<S>(params); });
}

template <class T, class C, int D>
bool choose_mma(int rows, const Params& params, const Options& options) {
  if (rows == 16)
    run_mma<stateful::Mma16<T, D, C>>(params, options);
  else if (rows == 32)
    run_mma<stateful::Mma32<T, D, C>>(params, options);
  else if (rows == 64)
    run_mma<stateful::Mma64<T, D, C>>(params, options);
  else
    return false;
  return true;
}

#ifdef STATEFUL_EMULATE_FEW  // builds in a third of the time
constexpr bool kAll = false;
#else
constexpr bool kAll = true;
#endif

template <class T, class C>
bool choose_head_size(int head_size, int rows, const Params& params, const Options& options) {
  if (head_size == 64) return choose_mma<T, C, 64>(rows, params, options);
  if constexpr (kAll) {
    if (head_size == 128) return choose_mma<T, C, 128>(rows, params, options);
    if (head_size == 256) return choose_mma<T, C, 256>(rows, params, options);
  }
  return false;
}

template <class T>
bool choose_cache(bool is_fp8, int head_size, int rows, const Params& params,
                  const Options& options) {
  return is_fp8 ? choose_head_size<T, stateful::Fp8>(head_size, rows, params, options)
                : choose_head_size<T, T>(head_size, rows, params, options);
}

template <class T, int D>
bool run_wgmma(const Params& p, const stateful::TensorMaps& maps, const Options& options) {
  using S = stateful::WgmmaShape<T, D>;
  emulator::random_state = options.seed * 2654435761u + 1;
  emulator::launch(options.grid, S::kThreads, S::kSharedBytes, options.most_alive,
                   [&] { stateful::delta_append_wgmma<S>(p, maps); });
  return true;
}

template <class T>
bool choose_wgmma(int head_size, const Params& p, const stateful::TensorMaps& maps,
                  const Options& options) {
  if (head_size == 64) return run_wgmma<T, 64>(p, maps, options);
  if constexpr (kAll) {
    if (head_size == 128) return run_wgmma<T, 128>(p, maps, options);
    if (head_size == 256) return run_wgmma<T, 256>(p, maps, options);
  }
  return false;
}

template <class Run>
int guarded(Run run) {
  try {
    return run() ? 0 : 1;
  } catch (const std::runtime_error&) {
    return 2;
  }
}

stateful::TensorMap map_over(const void* base, int64_t columns, int64_t rows, int64_t heads,
                             int64_t blocks, int64_t row, int64_t head, int64_t block) {
  return {static_cast<const unsigned char*>(base),
          {columns, rows, heads, blocks},
          {row * 2, head * 2, block * 2}};
}

}  // namespace

// 0: done; 1: no such kernel; 2: it hangs.
extern "C" int stateful_emulate_mma(int is_half, int head_size, int rows, const Params* params,
                                    const Options* options) {
  return guarded([&] {
    if constexpr (kAll)
      if (is_half)
        return choose_cache<__half>(options->is_fp8, head_size, rows, *params, *options);
    return !is_half &&
           choose_cache<__nv_bfloat16>(options->is_fp8, head_size, rows, *params, *options);
  });
}

extern "C" int stateful_emulate_wgmma(int is_half, int head_size, int rows, const Params* params,
                                      const Options* options) {
  if (rows != 128 || options->is_fp8) return 1;
  const Params& p = *params;
  const int64_t d = head_size, heads = options->num_kv_heads, tokens = options->num_tokens;
  const stateful::TensorMaps maps = {
      map_over(p.cache, 2 * d, p.page_size, heads, options->num_blocks, p.cache_token,
               p.cache_head, p.cache_block),
      map_over(p.k_new, d, tokens, heads, 1, p.k_token, p.k_head, 0),
      map_over(p.v_new, d, tokens, heads, 1, p.v_token, p.v_head, 0)};
  return guarded([&] {
    if constexpr (kAll)
      if (is_half) return choose_wgmma<__half>(head_size, p, maps, *options);
    return !is_half && choose_wgmma<__nv_bfloat16>(head_size, p, maps, *options);
  });
}

extern "C" int stateful_sizes(int index) {
  const int sizes[] = {sizeof(Params), sizeof(stateful::Unit), sizeof(stateful::Segment),
                       sizeof(stateful::Group), sizeof(stateful::Member)};
  return sizes[index];
}
