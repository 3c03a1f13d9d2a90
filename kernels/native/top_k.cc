// Keeps the entries of largest magnitude, and adds them up on receipt.
//
// A threshold guessed from a sample lets few entries through, in one pass over
// the message; the exact one is found among them. Where the guess was too high
// every entry is a candidate: slower, and the result is the same.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace fedjax_peft {
namespace {

constexpr int32_t kInfinity = 0x7F800000;
constexpr int64_t kChunk = 1 << 16;  // entries of one piece of work
constexpr int64_t kSlack = 16;       // entries that a vector may write too far
constexpr int64_t kSample = 512;
constexpr int kDigit = 11;  // bits

// Magnitudes as integers: 0 is nan, 1 is zero, and so on up to infinity.
inline int32_t Order(int32_t bits) {
  bits &= 0x7FFFFFFF;
  return bits > kInfinity ? 0 : bits + 1;
}

inline int32_t OrderOf(const float* x, int64_t i) {
  int32_t bits;
  std::memcpy(&bits, x + i, sizeof bits);
  return Order(bits);
}

// Writes the indices in begin..end-1 whose order is at least `low`, ascending;
// returns how many. `out` has kSlack entries more than that.
int64_t ScreenBase(const float* x, int64_t begin, int64_t end, int32_t low,
                   int32_t* out) {
  int64_t n = 0;
  for (int64_t i = begin; i < end; ++i) {
    out[n] = static_cast<int32_t>(i);
    n += OrderOf(x, i) >= low;
  }
  return n;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) int64_t ScreenAvx2(const float* x,
                                                   int64_t begin, int64_t end,
                                                   int32_t low, int32_t* out) {
  const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
  const __m256i infinity = _mm256_set1_epi32(kInfinity);
  const __m256i one = _mm256_set1_epi32(1);
  const __m256i below = _mm256_set1_epi32(low - 1);
  int64_t n = 0, i = begin;
  for (; i + 8 <= end; i += 8) {
    const __m256i bits = _mm256_and_si256(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i)), magnitude);
    const __m256i nan = _mm256_cmpgt_epi32(bits, infinity);
    const __m256i order =
        _mm256_andnot_si256(nan, _mm256_add_epi32(bits, one));
    const __m256i kept = _mm256_cmpgt_epi32(order, below);
    unsigned mask = _mm256_movemask_ps(_mm256_castsi256_ps(kept));
    for (; mask != 0; mask &= mask - 1)
      out[n++] = static_cast<int32_t>(i + __builtin_ctz(mask));
  }
  return n + ScreenBase(x, i, end, low, out + n);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) int64_t
ScreenAvx512(const float* x, int64_t begin, int64_t end, int32_t low,
             int32_t* out) {
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  const __m512i infinity = _mm512_set1_epi32(kInfinity);
  // order >= low, without making the order of numbers.
  const __m512i lowest = _mm512_set1_epi32(std::max(low, 1) - 1);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,
                                          12, 13, 14, 15);
  int64_t n = 0, i = begin;
  for (; i + 16 <= end; i += 16) {
    const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude);
    const __mmask16 number = _mm512_cmple_epi32_mask(bits, infinity);
    const __mmask16 large =
        _mm512_mask_cmpge_epi32_mask(number, bits, lowest);
    const unsigned mask = low <= 0 ? 0xFFFF : large;
    const __m512i index =
        _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(i)));
    // Compressing to memory is slow on some machines; to a register it is not.
    _mm512_storeu_si512(out + n, _mm512_maskz_compress_epi32(mask, index));
    n += __builtin_popcount(mask);
  }
  return n + ScreenBase(x, i, end, low, out + n);
}
#endif

using Screen = int64_t (*)(const float*, int64_t, int64_t, int32_t, int32_t*);

Screen Chosen() {
#if defined(__x86_64__)
  if (Machine() == Isa::kAvx512) return ScreenAvx512;
  if (Machine() == Isa::kAvx2) return ScreenAvx2;
#endif
  return ScreenBase;
}

// An order that k entries or somewhat more are likely to reach.
int32_t Guess(const float* x, int64_t d, int64_t k) {
  if (d < 4 * kSample) return 0;
  const double expected = static_cast<double>(k) * kSample / d;
  const int64_t rank =
      static_cast<int64_t>(expected + 4 * std::sqrt(expected) + 8);
  if (rank >= kSample) return 0;
  int32_t sample[kSample];
  for (int64_t i = 0; i < kSample; ++i)
    sample[i] = OrderOf(x, i * d / kSample);
  std::nth_element(sample, sample + rank, sample + kSample,
                   [](int32_t a, int32_t b) { return a > b; });
  return sample[rank];
}

struct Threshold {
  int32_t order;  // the k-th largest
  int64_t room;   // how many of those that equal it are kept
};

// Finds it digit by digit, from the highest.
Threshold Select(const std::vector<int32_t>& orders, int64_t k) {
  uint32_t prefix = 0;
  int64_t room = k;
  for (int known = 31, shift; known > 0; known = shift) {
    shift = std::max(known - kDigit, 0);
    const uint32_t digits = (1u << (known - shift)) - 1;
    uint32_t count[1 << kDigit] = {};
    for (uint32_t order : orders)
      if (order >> known == prefix >> known) ++count[order >> shift & digits];
    uint32_t digit = digits;
    for (; count[digit] < room; --digit) room -= count[digit];
    prefix |= digit << shift;
  }
  return {static_cast<int32_t>(prefix), room};
}

// Indices of candidates, chunk by chunk, each where the chunk begins. A thread
// keeps its own: memory that is fresh for every message costs more than the
// work on it.
struct Candidates {
  int64_t pieces = 0;
  std::vector<int32_t> index, orders;
  std::vector<int64_t> count;

  static Candidates& Mine(int64_t d) {
    thread_local Candidates mine;
    mine.pieces = (d + kChunk - 1) / kChunk;
    const int64_t size = mine.pieces * (std::min(d, kChunk) + kSlack);
    if (static_cast<int64_t>(mine.index.size()) < size) mine.index.resize(size);
    mine.count.resize(mine.pieces);
    return mine;
  }
  int32_t* Piece(int64_t p) { return index.data() + p * (kChunk + kSlack); }
};

template <typename Run>
void Row(const float* x, int64_t d, int64_t k, float* values, int32_t* indices,
         Candidates& all, const Run& run) {
  const Screen screen = Chosen();
  int64_t total = 0;
  for (int32_t low = Guess(x, d, k); ; low = 0) {
    run(all.pieces, [&](int64_t p) {
      const int64_t begin = p * kChunk;
      all.count[p] =
          screen(x, begin, std::min(begin + kChunk, d), low, all.Piece(p));
    });
    total = 0;
    for (int64_t n : all.count) total += n;
    if (total >= k) break;
  }
  all.orders.clear();
  all.orders.reserve(total);
  for (int64_t p = 0; p < all.pieces; ++p)
    for (int64_t j = 0; j < all.count[p]; ++j)
      all.orders.push_back(OrderOf(x, all.Piece(p)[j]));
  auto [threshold, room] = Select(all.orders, k);
  const int32_t* order = all.orders.data();
  int64_t n = 0;
  for (int64_t p = 0; p < all.pieces; ++p) {
    for (int64_t j = 0; j < all.count[p]; ++j, ++order) {
      if (*order < threshold || (*order == threshold && room-- <= 0)) continue;
      indices[n] = all.Piece(p)[j];
      values[n++] = x[all.Piece(p)[j]];
    }
  }
}

// The last `rank` axes are the kernel's own; those before them are a batch.
template <typename Buffer>
int64_t Batch(const Buffer& buffer, size_t rank) {
  int64_t n = 1;
  const auto dims = buffer.dimensions();
  for (size_t i = 0; i + rank < dims.size(); ++i) n *= dims[i];
  return n;
}

template <typename Buffer>
int64_t Axis(const Buffer& buffer, size_t from_last) {
  const auto dims = buffer.dimensions();
  return dims[dims.size() - from_last];
}

ffi::Error TopKImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                    ffi::ResultBuffer<ffi::F32> values,
                    ffi::ResultBuffer<ffi::S32> indices) {
  const int64_t rows = Batch(x, 1), d = Axis(x, 1), k = Axis(*values, 1);
  if (rows == 0) return ffi::Error::Success();
  const auto row = [&](int64_t r, Candidates& all, const auto& run) {
    Row(x.typed_data() + r * d, d, k, values->typed_data() + r * k,
        indices->typed_data() + r * k, all, run);
  };
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  if (rows < threads) {  // threads share a row
    Candidates& all = Candidates::Mine(d);
    for (int64_t r = 0; r < rows; ++r)
      row(r, all, [&](int64_t n, const auto& fun) { ForEach(pool, n, fun); });
    return ffi::Error::Success();
  }
  const int64_t group = std::max<int64_t>(1, std::min(rows / (4 * threads),
                                                      kChunk / d));
  ForEach(pool, (rows + group - 1) / group, [&](int64_t g) {
    Candidates& all = Candidates::Mine(d);
    for (int64_t r = g * group; r < std::min(rows, (g + 1) * group); ++r)
      row(r, all, [](int64_t n, const auto& fun) {
        for (int64_t p = 0; p < n; ++p) fun(p);
      });
  });
  return ffi::Error::Success();
}

// Entries of acc in begin..end-1 only; the others belong to another piece.
void AddRange(float* acc, int64_t begin, int64_t end, const float* values,
              const int32_t* indices, const float* weight, int64_t clients,
              int64_t k) {
  const uint32_t low = static_cast<uint32_t>(begin);
  const uint32_t width = static_cast<uint32_t>(end - begin);
  for (int64_t c = 0; c < clients; ++c) {
    if (weight[c] == 0) continue;
    const float w = weight[c];
    const float* v = values + c * k;
    const int32_t* index = indices + c * k;
    for (int64_t j = 0; j < k; ++j) {
      const uint32_t i = static_cast<uint32_t>(index[j]) - low;
      if (i < width) acc[begin + i] += v[j] * w;
    }
  }
}

ffi::Error ScatterAddImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> acc,
                          ffi::Buffer<ffi::F32> values,
                          ffi::Buffer<ffi::S32> indices,
                          ffi::Buffer<ffi::F32> weight,
                          ffi::ResultBuffer<ffi::F32> out) {
  const int64_t rows = Batch(acc, 1), d = Axis(acc, 1);
  const int64_t clients = Axis(values, 2), k = Axis(values, 1);
  if (rows == 0 || d == 0) return ffi::Error::Success();
  if (out->typed_data() != acc.typed_data())
    std::memcpy(out->typed_data(), acc.typed_data(), acc.size_bytes());
  // Every piece reads all indices, so pieces are as many as there are threads.
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  int64_t pieces = rows >= threads ? 1 : (threads + rows - 1) / rows;
  if (clients * k < 1 << 14) pieces = 1;
  pieces = std::min(pieces, d);
  ForEach(pool, rows * pieces, [&](int64_t i) {
    const int64_t r = i / pieces, p = i % pieces;
    AddRange(out->typed_data() + r * d, p * d / pieces, (p + 1) * d / pieces,
             values.typed_data() + r * clients * k,
             indices.typed_data() + r * clients * k,
             weight.typed_data() + r * clients, clients, k);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fedjax_peft

XLA_FFI_DEFINE_HANDLER_SYMBOL(TopK, fedjax_peft::TopKImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(ScatterAdd, fedjax_peft::ScatterAddImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
