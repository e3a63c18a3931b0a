// SPDX-License-Identifier: Apache-2.0
// Weak memory, as far as the kernels rely on it.
//
// What store_fresh writes is seen by its own thread at once, by its CTA behind a barrier, and by
// other CTAs at any later time, in any order; for certain once a thread that knows of it has
// released. load_fresh may return what stood there before for as long as its thread has acquired
// nothing newer. What store_for_async writes reaches wgmma at any later time, and for certain
// behind the fence between proxies. Everything else is sequentially consistent.
#pragma once
#include <unordered_map>

namespace emulator {

// Words that are on their way, by their address.
using Words = std::unordered_map<uint32_t*, uint32_t>;

struct Past {
  uint32_t value = 0;
  uint64_t until = 0;  // the time when another one took its place
};

inline std::unordered_map<const uint32_t*, Past> past;
inline uint64_t now = 0;
inline uint32_t flush_odds = 0;  // of 16, drawn for each launch: how soon a store arrives by itself

inline void flush(Words& words) {
  if (words.empty()) return;
  ++now;
  for (const auto& [to, value] : words) {
    past[to] = {*to, now};
    *to = value;
  }
  words.clear();
}

inline void flush_some(Words& words) {
  Words chosen;
  for (auto word = words.begin(); word != words.end();) {
    if (random_bits() & 1) {
      chosen.insert(*word);
      word = words.erase(word);
    } else {
      ++word;
    }
  }
  flush(chosen);
}

// What one thread has written, and what it may no longer miss.
struct View {
  Words own;              // that no other thread knows of
  uint64_t acquired = 0;  // everything that was there then is seen
  std::vector<std::pair<void*, std::array<unsigned char, 16>>> for_async;

  void fence_async() {
    for (const auto& [to, bytes] : for_async) memcpy(to, bytes.data(), bytes.size());
    for_async.clear();
  }
};

// What the threads of a CTA have told each other at barriers.
struct Shared {
  Words known;
  uint64_t acquired = 0;

  void tell(View& view) {
    for (const auto& [to, value] : view.own) known[to] = value;
    view.own.clear();
    acquired = std::max(acquired, view.acquired);
  }
  void hear(View& view) const { view.acquired = std::max(view.acquired, acquired); }
};

template <class V>
void store(View& view, V* to, const V& value) {
  uint32_t words[sizeof(V) / 4];
  memcpy(words, &value, sizeof(V));
  for (size_t i = 0; i < sizeof(V) / 4; ++i)
    view.own[reinterpret_cast<uint32_t*>(to) + i] = words[i];
}

template <class V>
V load(const View& view, const Shared& shared, const V* from) {
  uint32_t words[sizeof(V) / 4];
  for (size_t i = 0; i < sizeof(V) / 4; ++i) {
    auto* const at = const_cast<uint32_t*>(reinterpret_cast<const uint32_t*>(from) + i);
    const auto own = view.own.find(at), known = shared.known.find(at);
    const auto before = past.find(at);
    if (own != view.own.end())
      words[i] = own->second;
    else if (known != shared.known.end())
      words[i] = known->second;
    else if (before != past.end() && before->second.until > view.acquired && (random_bits() & 1))
      words[i] = before->second.value;
    else
      words[i] = *at;
  }
  V value;
  memcpy(&value, words, sizeof(V));
  return value;
}

}  // namespace emulator
