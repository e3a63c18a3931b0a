// SPDX-License-Identifier: Apache-2.0
// Runs the kernels' device code on the host, so that they are tested where no GPU is.
//
// Each CUDA thread is a fiber. Several CTAs are alive at a time; which CTA and which warp goes on,
// and for how long, is drawn at random. Copies without a waiter (cp.async) happen at
// once or as late as their wait allows, drawn at random too: a missing wait, a missing barrier or a
// stage freed too early shows as wrong numbers for some seeds. Shared memory is filled with NaN
// before each CTA. Weak memory: emulator_memory.h. Not covered: speed.
#pragma once
#include <setjmp.h>
#include <ucontext.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <dlfcn.h>
#include <sanitizer/common_interface_defs.h>
#define STATEFUL_ASAN 1
#endif

namespace emulator {

inline uint64_t random_state = 1;

inline uint32_t random_bits() {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>(random_state >> 33);
}

}  // namespace emulator

#include "emulator_memory.h"

namespace emulator {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr long kMostIdleRounds = 20'000;  // so long and no barrier was passed: a deadlock
inline long idle_rounds = 0;

struct Copy {
  void* to;
  const void* from;
  bool valid;
  void run() const {
    if (valid)
      memcpy(to, from, 16);
    else
      memset(to, 0, 16);
  }
};

// An mbarrier: a phase ends when all have arrived and all bytes are there.
struct ByteBarrier {
  int count = 0, pending = 0;
  bool is_fenced = false;  // copies see that it was initialized
  long bytes = 0;
  int phase = 0;
  void settle() {
    if (pending == 0 && bytes == 0) {
      pending = count;
      phase ^= 1;
      idle_rounds = 0;
    }
  }
};

// A barrier of a fixed number of threads, by generations.
struct Barrier {
  int count = 0;
  uint64_t generation = 0;
};

struct Cta;

struct Thread {
  jmp_buf resume;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  int index = 0;
  Cta* cta = nullptr;
  View view;
  std::vector<std::vector<Copy>> copies;  // by commit group, the open one last
  std::vector<std::vector<std::function<void()>>> products{1};  // of wgmma, likewise
#ifdef STATEFUL_ASAN
  void* fake_stack = nullptr;
#endif
};

struct Warp {
  Barrier barrier;
  unsigned char slots[kLanes][64];  // what the lanes show each other
};

struct Cta {
  dim3 block;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[16];  // 0: __syncthreads
  std::unique_ptr<unsigned char, void (*)(void*)> memory{nullptr, free};
  unsigned char* shared = nullptr;  // aligned to 1024
  size_t shared_bytes = 0;
  int alive = 0;
  Shared told;
  std::map<const void*, ByteBarrier> byte_barriers;
  std::vector<std::function<void()>> boxes;  // TMA copies that have not happened yet
};

inline jmp_buf scheduler;
inline Thread* current = nullptr;
inline std::function<void()> kernel;
#ifdef STATEFUL_ASAN
inline const void* main_stack = nullptr;
inline size_t main_stack_bytes = 0;
inline void* main_fake_stack = nullptr;
#endif

inline void jump(jmp_buf to) {
#ifdef STATEFUL_ASAN
  // The sanitizer's own marks the rest of the stack as usable: fivefold time, and no use here.
  using Jump = void (*)(jmp_buf, int);
  static const Jump found =
      reinterpret_cast<Jump>(dlsym(dlopen("libc.so.6", RTLD_NOW), "_longjmp"));
  found(to, 1);
#else
  _longjmp(to, 1);
#endif
}

inline void leave() {
#ifdef STATEFUL_ASAN
  __sanitizer_start_switch_fiber(current->done ? nullptr : &current->fake_stack, main_stack,
                                 main_stack_bytes);
#endif
  jump(scheduler);
}

inline void yield() {
  Thread* const self = current;
  if (!_setjmp(self->resume)) leave();
#ifdef STATEFUL_ASAN
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

inline void enter_thread() {
#ifdef STATEFUL_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes);
#endif
  kernel();
  current->done = true;
  current->cta->alive--;
  idle_rounds = 0;
  leave();
}

inline void step(Thread& thread) {
  current = &thread;
#ifdef STATEFUL_ASAN
  __sanitizer_start_switch_fiber(&main_fake_stack, thread.stack.get(), kStackBytes);
#endif
  if (!_setjmp(scheduler)) {
    if (thread.started) jump(thread.resume);
    thread.started = true;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter_thread, 0);
    setcontext(&thread.context);
  }
#ifdef STATEFUL_ASAN
  __sanitizer_finish_switch_fiber(main_fake_stack, nullptr, nullptr);
#endif
}

inline void join(Barrier& barrier, int num_threads) {
  const uint64_t generation = barrier.generation;
  if (++barrier.count == num_threads) {
    barrier.count = 0;
    barrier.generation++;
    idle_rounds = 0;
  }
  while (barrier.generation == generation) yield();
}

// The same, of a barrier that orders memory too.
inline void meet(Barrier& barrier, int num_threads) {
  current->cta->told.tell(current->view);
  join(barrier, num_threads);
  current->cta->told.hear(current->view);
}

inline Warp& warp() { return current->cta->warps[current->index / kLanes]; }
inline int lane() { return current->index % kLanes; }
inline void join_warp() { join(warp().barrier, kLanes); }

// Show the other lanes a value, then read theirs.
template <class V, class Read>
auto exchange(const V& value, Read read) {
  static_assert(sizeof(V) <= 64, "a slot holds 64 bytes");
  Warp& w = warp();
  memcpy(w.slots[lane()], &value, sizeof(V));
  join_warp();
  auto result = read([&w](int other) {
    V theirs;
    memcpy(&theirs, w.slots[other], sizeof(V));
    return theirs;
  });
  join_warp();
  return result;
}

inline std::unique_ptr<Cta> make_cta(unsigned index, int num_threads, size_t shared_bytes) {
  auto cta = std::make_unique<Cta>();
  cta->block = dim3(index, 0, 0);
  cta->threads.resize(num_threads);
  cta->warps.resize(num_threads / kLanes);
  void* memory = nullptr;  // not padded, so that the address sanitizer sees its end
  if (posix_memalign(&memory, 1024, shared_bytes)) throw std::bad_alloc();
  cta->memory.reset(static_cast<unsigned char*>(memory));
  cta->shared = cta->memory.get();
  cta->shared_bytes = shared_bytes;
  memset(cta->shared, 0xff, shared_bytes);
  cta->alive = num_threads;
  for (int i = 0; i < num_threads; ++i) {
    Thread& thread = cta->threads[i];
    thread.index = i;
    thread.cta = cta.get();
    thread.stack.reset(new char[kStackBytes]);
    thread.copies.emplace_back();
  }
  return cta;
}

inline uint32_t copy_odds = 8;  // of 16, drawn for each launch: how eager TMA is

inline void run_some(Cta& cta) {
  while (!cta.boxes.empty() && random_bits() % 16 < copy_odds) {  // in any order
    const size_t chosen = random_bits() % cta.boxes.size();
    cta.boxes[chosen]();
    cta.boxes.erase(cta.boxes.begin() + static_cast<long>(chosen));
  }
  if (random_bits() % 16 < flush_odds) {
    flush_some(cta.told.known);
    Thread& thread = cta.threads[random_bits() % cta.threads.size()];
    flush_some(thread.view.own);
    thread.view.fence_async();
  }
  const int first = static_cast<int>(random_bits() % cta.warps.size()) * kLanes;
  const int rounds = 1 + static_cast<int>(random_bits() % 200);
  for (int round = 0; round < rounds && cta.alive > 0; ++round)
    for (int i = first; i < first + kLanes; ++i)
      if (!cta.threads[i].done) step(cta.threads[i]);
}

// Run a grid. Throws std::runtime_error when no thread can go on.
inline void launch(unsigned grid, int num_threads, size_t shared_bytes, int most_alive,
                   std::function<void()> body) {
  kernel = std::move(body);
  const uint32_t odds[] = {1, 8, 15};
  copy_odds = odds[random_bits() % 3];
  flush_odds = odds[random_bits() % 3] - 1;
  past.clear();
  std::vector<std::unique_ptr<Cta>> alive;
  std::vector<unsigned> waiting;
  std::vector<Words> last_words;  // of CTAs that have ended: they arrive with the launch's end
  for (unsigned i = 0; i < grid; ++i) waiting.insert(waiting.begin() + random_bits() % (i + 1), i);
  idle_rounds = 0;
  while (!alive.empty() || !waiting.empty()) {
    if (!waiting.empty() && static_cast<int>(alive.size()) < most_alive) {
      alive.push_back(make_cta(waiting.back(), num_threads, shared_bytes));
      waiting.pop_back();
      continue;
    }
    const size_t chosen = random_bits() % alive.size();
    run_some(*alive[chosen]);
    if (alive[chosen]->alive == 0) {
      for (Thread& thread : alive[chosen]->threads) alive[chosen]->told.tell(thread.view);
      last_words.push_back(std::move(alive[chosen]->told.known));
      alive.erase(alive.begin() + static_cast<long>(chosen));
    }
    if (++idle_rounds > kMostIdleRounds) throw std::runtime_error("deadlock");
  }
  for (Words& words : last_words) flush(words);
}

struct ThreadIndex {
  struct {
    operator unsigned() const { return static_cast<unsigned>(current->index); }
  } x;
};
struct BlockIndex {
  struct {
    operator unsigned() const { return current->cta->block.x; }
  } x;
};

}  // namespace emulator

static emulator::ThreadIndex threadIdx;
static emulator::BlockIndex blockIdx;

inline void __syncthreads() {
  emulator::meet(emulator::current->cta->barriers[0],
                 static_cast<int>(emulator::current->cta->threads.size()));
}

#include "emulator_prim.h"
