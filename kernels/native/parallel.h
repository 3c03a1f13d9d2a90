// Work in pieces, on the threads that XLA lends.
//
// The caller takes part, and waits only for pieces that somebody has begun:
// many devices of one process share a pool, and may all be inside of it.
#ifndef FEDJAX_PEFT_PARALLEL_H_
#define FEDJAX_PEFT_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace fedjax_peft {

// Calls fun(i) for every i in 0..n-1, each once, in any order.
template <typename Fun>
void ForEach(xla::ffi::ThreadPool pool, int64_t n, const Fun& fun) {
  struct State {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
    std::mutex mutex;
    std::condition_variable all;
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), n) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < n; ++i) fun(i);
    return;
  }
  auto state = std::make_shared<State>();
  // `fun` outlives every piece: a helper touches it only while a piece is left.
  auto work = [state, n, &fun] {
    for (;;) {
      const int64_t i = state->next.fetch_add(1);
      if (i >= n) return;
      fun(i);
      if (state->done.fetch_add(1) + 1 == n) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->all.notify_all();
      }
    }
  };
  // XLA keeps what it is given, so each helper gets a copy.
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all.wait(lock, [&] { return state->done.load() == n; });
}

// What the machine can do; asked once. FEDJAX_PEFT_ISA=avx2 or =base makes it
// do with less, so that one machine can test them all.
enum class Isa { kBase, kAvx2, kAvx512 };

inline Isa Machine() {
  static const Isa isa = [] {
#if defined(__x86_64__)
    const char* set = std::getenv("FEDJAX_PEFT_ISA");
    const std::string most = set == nullptr ? "" : set;
    if (most == "base") return Isa::kBase;
    __builtin_cpu_init();
    if (most == "avx2" && __builtin_cpu_supports("avx2")) return Isa::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"))
      return Isa::kAvx512;
    if (__builtin_cpu_supports("avx2")) return Isa::kAvx2;
#endif
    return Isa::kBase;
  }();
  return isa;
}

}  // namespace fedjax_peft

#endif  // FEDJAX_PEFT_PARALLEL_H_
