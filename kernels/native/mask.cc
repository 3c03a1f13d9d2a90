// Adds keystreams of ChaCha20 to rows, and subtracts them from others.
//
// Each piece of work owns some lanes of the planar tiles (mask/layout.py), so
// that no two threads write to the same place. It takes one vector of lanes of
// every row that has a key into a small buffer, goes through all keys there,
// and writes the rows back; the keystream is never anywhere but in registers.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace fedjax_peft {
namespace {

namespace ffi = xla::ffi;

constexpr int kWords = 16;
constexpr int64_t kLanes = 1024;
constexpr int64_t kTile = kWords * kLanes;
constexpr int64_t kStep = 128;

// Lanes that are worked on at a time: a cache line of each word.
constexpr int kGroup = 16;

struct alignas(64) Row {
  uint32_t words[kWords][kGroup];
};

#define QUARTER(Rotate, a, b, c, d)                    \
  x[a] += x[b], x[d] = Rotate(x[d] ^ x[a], 16),        \
  x[c] += x[d], x[b] = Rotate(x[b] ^ x[c], 12),        \
  x[a] += x[b], x[d] = Rotate(x[d] ^ x[a], 8),         \
  x[c] += x[d], x[b] = Rotate(x[b] ^ x[c], 7)

INLINE uint32_t Rotate(uint32_t x, int n) { return x << n | x >> (32 - n); }

// A key, and the places of its two rows in the buffer; -1 is nobody.
struct Pair {
  uint32_t first[kWords];  // the state before the first round, counter 0
  uint32_t begun[kWords];  // after the quarter rounds that see no counter
  int64_t plus, minus;

  Pair(const uint32_t* key, const uint32_t* nonce, int64_t plus, int64_t minus)
      : first{0x61707865, 0x3320646e, 0x79622d32, 0x6b206574},
        plus(plus), minus(minus) {
    std::copy_n(key, 8, first + 4);
    std::copy_n(nonce, 3, first + 13);
    std::copy_n(first, kWords, begun);
    uint32_t* x = begun;
    QUARTER(Rotate, 1, 5, 9, 13);
    QUARTER(Rotate, 2, 6, 10, 14);
    QUARTER(Rotate, 3, 7, 11, 15);
  }
};

// The matrix [count, size] at `data`, and what is added to it.
struct Task {
  uint32_t* data;
  int64_t size;
  std::vector<int64_t> rows;  // those with a key
  std::vector<Pair> pairs;

  Task(uint32_t* data, int64_t count, int64_t size, int64_t n,
       const uint32_t* keys, const int32_t* plus, const int32_t* minus,
       const uint32_t* nonce)
      : data(data), size(size) {
    std::vector<int64_t> places(count, -1);
    const auto place = [&](int64_t row) -> int64_t {
      if (row < 0 || row >= count) return -1;
      if (places[row] < 0) {
        places[row] = rows.size();
        rows.push_back(row);
      }
      return places[row];
    };
    for (int64_t p = 0; p < n; ++p) {
      const int64_t to = place(plus[p]), from = place(minus[p]);
      if (std::max(to, from) >= 0)
        pairs.emplace_back(keys + 8 * p, nonce, to, from);
    }
  }

  int64_t Lanes() const {
    const int64_t rest = size % kTile, step = kWords * kStep;
    return size / kTile * kLanes + (rest + step - 1) / step * kStep;
  }

  // Copies a group of lanes of all rows that have a key, here or back there.
  template <bool kHere>
  void Copy(int64_t group, Row* here) const {
    const int64_t tile = group / kLanes;
    const int64_t lanes = std::min(kLanes, Lanes() - tile * kLanes);
    const int64_t begin = tile * kTile + group % kLanes;
    for (const int64_t row : rows) {
      for (int w = 0; w < kWords; ++w) {
        const int64_t at = begin + w * lanes;
        uint32_t* a = here->words[w];
        uint32_t* b = data + row * size + at;
        if (at + kGroup <= size) {
          std::memcpy(kHere ? a : b, kHere ? b : a, 4 * kGroup);
        } else if (at < size) {
          std::memcpy(kHere ? a : b, kHere ? b : a, 4 * (size - at));
        }
      }
      ++here;
    }
  }
};

// A vector of words, and how its words are rotated to the left.
struct Base {
  typedef uint32_t V __attribute__((vector_size(16)));
  static INLINE V Rotate(V x, int n) { return x << n | x >> (32 - n); }
};
#define ISA Base
#define TARGET
#include "mask_lanes.h"
#undef ISA
#undef TARGET

#if defined(__x86_64__)
#define ISA Avx2
#define TARGET __attribute__((target("avx2")))
struct Avx2 {
  typedef uint32_t V __attribute__((vector_size(32)));
  TARGET static INLINE V Rotate(V x, int n) {
    if (n % 8) return x << n | x >> (32 - n);
    // Whole bytes are shuffled.
    const int64_t low = n == 16 ? 0x0504070601000302 : 0x0605040702010003;
    const __m128i bytes = _mm_set_epi64x(low + 0x0808080808080808, low);
    return (V)_mm256_shuffle_epi8((__m256i)x,
                                  _mm256_broadcastsi128_si256(bytes));
  }
};
#include "mask_lanes.h"
#undef ISA
#undef TARGET

#define ISA Avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
struct Avx512 {
  typedef uint32_t V __attribute__((vector_size(64)));
  TARGET static INLINE V Rotate(V x, int n) { return x << n | x >> (32 - n); }
};
#include "mask_lanes.h"
#undef ISA
#undef TARGET
#endif

void MaskLanes(const Task& task, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  if (Machine() == Isa::kAvx512) return Mask(Avx512(), task, begin, end);
  if (Machine() == Isa::kAvx2) return Mask(Avx2(), task, begin, end);
#endif
  Mask(Base(), task, begin, end);
}

ffi::Error MaskAddImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::U32> q,
                       ffi::Buffer<ffi::U32> keys, ffi::Buffer<ffi::S32> plus,
                       ffi::Buffer<ffi::S32> minus, ffi::Buffer<ffi::U32> nonce,
                       ffi::ResultBuffer<ffi::U32> y) {
  const auto shape = q.dimensions();
  const int64_t count = shape[shape.size() - 2], size = shape.back();
  const int64_t n = plus.dimensions().back();
  uint32_t* data = y->typed_data();
  if (data != q.typed_data())
    std::memcpy(data, q.typed_data(), q.size_bytes());
  const int64_t total = q.element_count();
  const int64_t batch = total ? total / count / size : 0;
  std::vector<Task> tasks;
  tasks.reserve(batch);
  for (int64_t b = 0; b < batch; ++b) {
    tasks.emplace_back(data + b * count * size, count, size, n,
                       keys.typed_data() + b * 8 * n, plus.typed_data() + b * n,
                       minus.typed_data() + b * n, nonce.typed_data() + b * 3);
  }
  // A piece makes some 256 KiB of keystream, where there are lanes enough.
  const int64_t lanes = batch ? tasks[0].Lanes() : 0;
  const int64_t steps =
      std::clamp<int64_t>(32 / std::max<int64_t>(n, 1), 1, 8);
  const int64_t step = kStep * steps;
  const int64_t pieces = (lanes + step - 1) / step;
  ForEach(pool, batch * pieces, [&](int64_t i) {
    const Task& task = tasks[i / pieces];
    const int64_t begin = i % pieces * step;
    if (!task.pairs.empty())
      MaskLanes(task, begin, std::min(begin + step, lanes));
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fedjax_peft

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    MaskAdd, fedjax_peft::MaskAddImpl,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<xla::ffi::Buffer<xla::ffi::U32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::U32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::U32>>()
        .Ret<xla::ffi::Buffer<xla::ffi::U32>>());
