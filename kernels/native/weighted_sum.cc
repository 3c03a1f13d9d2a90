// Weighted sums of wires, and sums of rows, into an accumulator.
//
// The element axis is cut into tiles: every piece of work owns a tile, so no
// two threads write to the same place, and walks through the clients in their
// order, kGroup at a time, while the tile stays in the cache.
// A product and its sum are rounded once (a fused operation), but in the
// baseline twice; every other bit is the same on every machine.

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

#define INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#endif

namespace fedjax_peft {
namespace {

namespace ffi = xla::ffi;

// Rows that are read side by side: each is a stream of its own.
constexpr int kGroup = 8;

// What a tile reads is about this much, so that handing it out costs little.
constexpr int64_t kPieceBytes = 1 << 18;
constexpr int64_t kTileMin = 1 << 10;
constexpr int64_t kTileMax = 1 << 15;

// How many elements a tile has, a multiple of `unit`.
int64_t Tile(int64_t size, int64_t unit, int64_t row_bytes, int64_t rows,
             int64_t threads) {
  const int64_t bytes = std::max<int64_t>(row_bytes * rows, 1);
  const int64_t pieces =
      std::clamp<int64_t>(bytes / kPieceBytes, 1, 4 * threads);
  const int64_t tile =
      std::clamp((size + pieces - 1) / pieces, kTileMin, kTileMax);
  return (tile + unit - 1) / unit * unit;
}

// How `size` values lie on a wire.
struct Layout {
  int64_t size, block, blocks, entries, block_bytes;

  Layout(int64_t size, int64_t bits, int64_t block)
      : size(size), block(size < block ? (size + 7) / 8 * 8 : block) {
    blocks = size ? (size + this->block - 1) / this->block : 0;
    entries = bits < 8 ? this->block * bits / 8 : this->block;
    block_bytes = bits == 16 ? 2 * entries : entries;
  }
};

// The values of a field of an entry.
template <int kBits, typename Entry>
INLINE float Decode(Entry entry, int shift) {
  if constexpr (kBits >= 8) return static_cast<float>(entry);
  const int field = (entry >> shift) & ((1 << kBits) - 1);
  if constexpr (kBits == 1) return static_cast<float>(2 * field - 1);
  constexpr int kHalf = 1 << (kBits - 1);
  return static_cast<float>((field ^ kHalf) - kHalf);
}

// Adds kRows rows of one block: acc += factors[0] rows[0] + ..., in order.
// Plane j of the block has its values at acc + j * entries; the block ends
// after n values.
using AddBlock = void (*)(float* acc, const void* const* rows,
                          const float* factors, int64_t entries, int64_t n);

template <int kBits, int kRows, typename Entry>
void AddBlockBase(float* acc, const void* const* rows, const float* factors,
                  int64_t entries, int64_t n) {
  for (int64_t j = 0; j * entries < n; ++j) {
    float* __restrict plane = acc + j * entries;
    const int64_t end = std::min(entries, n - j * entries);
    for (int r = 0; r < kRows; ++r) {
      const Entry* row = static_cast<const Entry*>(rows[r]);
      for (int64_t i = 0; i < end; ++i)
        plane[i] += factors[r] * Decode<kBits>(row[i], j * kBits);
    }
  }
}

#if defined(__x86_64__)
// The values of the fields of each width, repeated: indexed by any number
// whose lowest bits are the field.
template <int kBits>
constexpr float kValues[16] = {};
template <>
constexpr float kValues<1>[16] = {-1, 1, -1, 1, -1, 1, -1, 1,
                                  -1, 1, -1, 1, -1, 1, -1, 1};
template <>
constexpr float kValues<2>[16] = {0, 1, -2, -1, 0, 1, -2, -1,
                                  0, 1, -2, -1, 0, 1, -2, -1};
template <>
constexpr float kValues<4>[16] = {0,  1,  2,  3,  4,  5,  6,  7,
                                  -8, -7, -6, -5, -4, -3, -2, -1};

// The first n of 16 lanes.
INLINE uint16_t Lanes(int64_t n) {
  return n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1;
}

template <int kBits, int kRows, bool kWhole>
INLINE AVX512 void Add16(float* acc, const void* const* rows,
                         const __m512* factors, __m512 values, int64_t entries,
                         int64_t i, int64_t n) {
  constexpr int kPlanes = kBits < 8 ? 8 / kBits : 1;
  __m512 sum[kPlanes];
  __mmask16 lanes[kPlanes];
#pragma GCC unroll 8
  for (int j = 0; j < kPlanes; ++j) {
    lanes[j] = kWhole ? 0xffff : Lanes(std::min(entries, n - j * entries) - i);
    sum[j] = _mm512_maskz_loadu_ps(lanes[j], acc + j * entries + i);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kBits == 16) {
      const int16_t* row = static_cast<const int16_t*>(rows[r]) + i;
      const __m512 q = _mm512_cvtepi32_ps(
          _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(lanes[0], row)));
      sum[0] = _mm512_fmadd_ps(factors[r], q, sum[0]);
    } else {
      const int8_t* row = static_cast<const int8_t*>(rows[r]) + i;
      const __m512i x =
          _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes[0], row));
      if constexpr (kBits == 8) {
        sum[0] = _mm512_fmadd_ps(factors[r], _mm512_cvtepi32_ps(x), sum[0]);
      } else {
#pragma GCC unroll 8
        for (int j = 0; j < kPlanes; ++j) {
          const __m512 q =
              _mm512_permutexvar_ps(_mm512_srli_epi32(x, j * kBits), values);
          sum[j] = _mm512_fmadd_ps(factors[r], q, sum[j]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kPlanes; ++j)
    _mm512_mask_storeu_ps(acc + j * entries + i, lanes[j], sum[j]);
}

template <int kBits, int kRows>
AVX512 void AddBlockAvx512(float* acc, const void* const* rows,
                           const float* factors, int64_t entries, int64_t n) {
  constexpr int kPlanes = kBits < 8 ? 8 / kBits : 1;
  const __m512 values = _mm512_loadu_ps(kValues<kBits>);
  __m512 factor[kRows];
  for (int r = 0; r < kRows; ++r) factor[r] = _mm512_set1_ps(factors[r]);
  const int64_t end = std::min(entries, n);
  const bool full = kPlanes == 1 || n == kPlanes * entries;
  const int64_t whole = full ? end / 16 * 16 : 0;
  int64_t i = 0;
  for (; i < whole; i += 16)
    Add16<kBits, kRows, true>(acc, rows, factor, values, entries, i, n);
  for (; i < end; i += 16)
    Add16<kBits, kRows, false>(acc, rows, factor, values, entries, i, n);
}

template <int kBits>
INLINE AVX2 __m256 Decode8(const void* row, int64_t i, int shift) {
  if constexpr (kBits == 16) {
    const int16_t* at = static_cast<const int16_t*>(row) + i;
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
  } else {
    const __m256i x = _mm256_cvtepi8_epi32(
        _mm_loadu_si64(static_cast<const int8_t*>(row) + i));
    if constexpr (kBits == 8) return _mm256_cvtepi32_ps(x);
    if constexpr (kBits == 4)
      return _mm256_cvtepi32_ps(
          _mm256_srai_epi32(_mm256_slli_epi32(x, 28 - shift), 28));
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(kValues<kBits>),
                                    _mm256_srli_epi32(x, shift));
  }
}

template <int kBits, int kRows, typename Entry>
AVX2 void AddBlockAvx2(float* acc, const void* const* rows,
                       const float* factors, int64_t entries, int64_t n) {
  constexpr int kPlanes = kBits < 8 ? 8 / kBits : 1;
#pragma GCC unroll 8
  for (int j = 0; j < kPlanes; ++j) {
    float* plane = acc + j * entries;
    const int64_t end = std::min(entries, n - j * entries);
    int64_t i = 0;
    for (; i + 8 <= end; i += 8) {
      __m256 sum = _mm256_loadu_ps(plane + i);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        sum = _mm256_fmadd_ps(_mm256_broadcast_ss(factors + r),
                              Decode8<kBits>(rows[r], i, j * kBits), sum);
      _mm256_storeu_ps(plane + i, sum);
    }
    for (; i < end; ++i)
      for (int r = 0; r < kRows; ++r)
        plane[i] = __builtin_fmaf(
            factors[r],
            Decode<kBits>(static_cast<const Entry*>(rows[r])[i], j * kBits),
            plane[i]);
  }
}
#endif

template <int kBits, int kRows, typename Entry>
AddBlock ForMachine() {
#if defined(__x86_64__)
  if (Machine() == Isa::kAvx512) return AddBlockAvx512<kBits, kRows>;
  if (Machine() == Isa::kAvx2 && __builtin_cpu_supports("fma"))
    return AddBlockAvx2<kBits, kRows, Entry>;
#endif
  return AddBlockBase<kBits, kRows, Entry>;
}

template <int kRows>
AddBlock ForBits(int64_t bits) {
  switch (bits) {
    case 1: return ForMachine<1, kRows, uint8_t>();
    case 2: return ForMachine<2, kRows, uint8_t>();
    case 4: return ForMachine<4, kRows, uint8_t>();
    case 8: return ForMachine<8, kRows, int8_t>();
    case 16: return ForMachine<16, kRows, int16_t>();
    default: return nullptr;
  }
}

struct Wires {
  const char* packed;
  const float* scale;
  const float* weight;
  int64_t row_bytes;
};

// Adds `rows` clients to the blocks first..last-1.
INLINE void AddClients(AddBlock add, int rows, float* acc, const Wires& wires,
                       const Layout& at, const int64_t* clients, int64_t first,
                       int64_t last) {
  const void* row[kGroup];
  float factor[kGroup];
  for (int64_t b = first; b < last; ++b) {
    for (int r = 0; r < rows; ++r) {
      const int64_t c = clients[r];
      row[r] = wires.packed + c * wires.row_bytes + b * at.block_bytes;
      factor[r] = wires.weight[c] * wires.scale[c * at.blocks + b];
    }
    add(acc + b * at.block, row, factor, at.entries,
        std::min(at.block, at.size - b * at.block));
  }
}

// The product of all axes but the last.
int64_t Batch(ffi::AnyBuffer::Dimensions dims) {
  int64_t n = 1;
  for (size_t i = 0; i + 1 < dims.size(); ++i) n *= dims[i];
  return n;
}

// Copies the accumulator unless it is the result already.
void Start(const ffi::AnyBuffer& acc, ffi::Result<ffi::AnyBuffer>& out) {
  if (acc.untyped_data() != out->untyped_data())
    std::copy_n(static_cast<const char*>(acc.untyped_data()), acc.size_bytes(),
                static_cast<char*>(out->untyped_data()));
}

ffi::Error WeightedSumImpl(ffi::ThreadPool pool, ffi::AnyBuffer acc,
                           ffi::AnyBuffer packed, ffi::AnyBuffer scale,
                           ffi::AnyBuffer weight,
                           ffi::Result<ffi::AnyBuffer> out, int64_t bits,
                           int64_t block) {
  const AddBlock group = ForBits<kGroup>(bits), one = ForBits<1>(bits);
  if (one == nullptr)
    return ffi::Error::InvalidArgument("bits must be 1, 2, 4, 8 or 16");
  if (out->element_count() == 0) return ffi::Error::Success();
  Start(acc, out);
  const int64_t batch = Batch(acc.dimensions());
  const Layout at(acc.dimensions().back(), bits, block);
  const int64_t count = weight.dimensions().back();
  const int64_t row_bytes = packed.dimensions().back() * (bits == 16 ? 2 : 1);
  const int64_t tile =
      Tile(at.size, at.block, row_bytes, count, pool.num_threads()) / at.block;
  const int64_t tiles = (at.blocks + tile - 1) / tile;
  ForEach(pool, batch * tiles, [&](int64_t i) {
    const int64_t b = i / tiles, t = i % tiles;
    const Wires wires = {
        static_cast<const char*>(packed.untyped_data()) + b * count * row_bytes,
        static_cast<const float*>(scale.untyped_data()) + b * count * at.blocks,
        static_cast<const float*>(weight.untyped_data()) + b * count,
        row_bytes};
    std::vector<int64_t> clients;
    for (int64_t c = 0; c < count; ++c)
      if (wires.weight[c] != 0) clients.push_back(c);
    float* sums = static_cast<float*>(out->untyped_data()) + b * at.size;
    const int64_t first = t * tile, last = std::min(at.blocks, first + tile);
    const int64_t n = clients.size();
    int64_t c = 0;
    for (; c + kGroup <= n; c += kGroup)
      AddClients(group, kGroup, sums, wires, at, &clients[c], first, last);
    for (; c < n; ++c)
      AddClients(one, 1, sums, wires, at, &clients[c], first, last);
  });
  return ffi::Error::Success();
}

// acc += rows[0] + ... + rows[kRows - 1], in order.
template <int kRows, typename T>
INLINE void Rows(T* __restrict acc, const T* const* rows, int64_t n) {
  const T* row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = rows[r];
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T sum = acc[i];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum += row[r][i];
    acc[i] = sum;
  }
}

template <typename T>
INLINE void AllRows(void* acc, const std::vector<const void*>& rows,
                    int64_t first, int64_t n) {
  const int64_t count = rows.size();
  const T* at[kGroup];
  int64_t c = 0;
  for (; c + kGroup <= count; c += kGroup) {
    for (int r = 0; r < kGroup; ++r)
      at[r] = static_cast<const T*>(rows[c + r]) + first;
    Rows<kGroup>(static_cast<T*>(acc) + first, at, n);
  }
  for (; c < count; ++c) {
    at[0] = static_cast<const T*>(rows[c]) + first;
    Rows<1>(static_cast<T*>(acc) + first, at, n);
  }
}

using RowsFun = void (*)(void*, const std::vector<const void*>&, int64_t,
                         int64_t);

template <typename T>
void RowsBase(void* acc, const std::vector<const void*>& rows, int64_t first,
              int64_t n) {
  AllRows<T>(acc, rows, first, n);
}
#if defined(__x86_64__)
template <typename T>
AVX2 void RowsAvx2(void* acc, const std::vector<const void*>& rows,
                   int64_t first, int64_t n) {
  AllRows<T>(acc, rows, first, n);
}
template <typename T>
AVX512 void RowsAvx512(void* acc, const std::vector<const void*>& rows,
                       int64_t first, int64_t n) {
  AllRows<T>(acc, rows, first, n);
}
#endif

template <typename T>
RowsFun RowsForMachine() {
#if defined(__x86_64__)
  if (Machine() == Isa::kAvx512) return RowsAvx512<T>;
  if (Machine() == Isa::kAvx2) return RowsAvx2<T>;
#endif
  return RowsBase<T>;
}

RowsFun ForDtype(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::U8: return RowsForMachine<uint8_t>();
    case ffi::DataType::U16: return RowsForMachine<uint16_t>();
    case ffi::DataType::U32: return RowsForMachine<uint32_t>();
    case ffi::DataType::F32: return RowsForMachine<float>();
    default: return nullptr;
  }
}

ffi::Error AddRowsImpl(ffi::ThreadPool pool, ffi::AnyBuffer acc,
                       ffi::AnyBuffer rows, ffi::Buffer<ffi::PRED> present,
                       ffi::Result<ffi::AnyBuffer> out) {
  const RowsFun add = ForDtype(acc.element_type());
  if (add == nullptr)
    return ffi::Error::InvalidArgument("acc must be unsigned or float32");
  if (out->element_count() == 0) return ffi::Error::Success();
  Start(acc, out);
  const int64_t batch = Batch(acc.dimensions());
  const int64_t size = acc.dimensions().back();
  const int64_t count = present.dimensions().back();
  const int64_t row_bytes = size * ffi::ByteWidth(acc.element_type());
  const int64_t tile = Tile(size, 64, row_bytes, count, pool.num_threads());
  const int64_t tiles = (size + tile - 1) / tile;
  ForEach(pool, batch * tiles, [&](int64_t i) {
    const int64_t b = i / tiles, t = i % tiles;
    std::vector<const void*> here;
    for (int64_t c = b * count; c < (b + 1) * count; ++c)
      if (present.typed_data()[c])
        here.push_back(static_cast<const char*>(rows.untyped_data()) +
                       c * row_bytes);
    add(static_cast<char*>(out->untyped_data()) + b * row_bytes, here, t * tile,
        std::min(tile, size - t * tile));
  });
  return ffi::Error::Success();
}

// Reads an array as fast as the machine can: what the sums are measured by.
INLINE uint32_t Xor(const uint32_t* x, int64_t n) {
  uint32_t all = 0;
  for (int64_t i = 0; i < n; ++i) all ^= x[i];
  return all;
}
uint32_t XorBase(const uint32_t* x, int64_t n) { return Xor(x, n); }
#if defined(__x86_64__)
AVX2 uint32_t XorAvx2(const uint32_t* x, int64_t n) { return Xor(x, n); }
AVX512 uint32_t XorAvx512(const uint32_t* x, int64_t n) { return Xor(x, n); }
#endif

ffi::Error ReadProbeImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::U32> x,
                         ffi::ResultBufferR0<ffi::U32> out) {
  auto probe = XorBase;
#if defined(__x86_64__)
  if (Machine() == Isa::kAvx512) probe = XorAvx512;
  if (Machine() == Isa::kAvx2) probe = XorAvx2;
#endif
  constexpr int64_t kPiece = 1 << 16;
  const int64_t size = x.element_count();
  std::atomic<uint32_t> all{0};
  ForEach(pool, (size + kPiece - 1) / kPiece, [&](int64_t i) {
    all ^= probe(x.typed_data() + i * kPiece,
                 std::min(kPiece, size - i * kPiece));
  });
  *out->typed_data() = all;
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(WeightedSum, WeightedSumImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("block"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(AddRows, AddRowsImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(ReadProbe, ReadProbeImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Ret<ffi::BufferR0<ffi::U32>>());

}  // namespace fedjax_peft
