// Quantizing on CPUs; the specification is quantize/reference.py.
//
// A block is read twice, for its largest magnitude and to be encoded, the
// second time from the first-level cache. The loops are written so that
// compilers vectorize them; they are compiled once for each instruction set.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#define INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define AVX2 __attribute__((target("avx2")))
#endif

namespace {

constexpr int64_t kMaxBlock = 4096;
constexpr int64_t kPiece = 1 << 15;        // values in a piece of work
constexpr float kSmallest = 0x1p-80f;      // scales below count as zero
constexpr uint32_t kInfinity = 0x7f800000;

constexpr int Shift(int bits) { return bits == 16 ? 15 : 16; }
constexpr int Levels(int bits) { return bits == 1 ? 1 : (1 << (bits - 1)) - 1; }
constexpr int Packing(int bits) { return bits < 8 ? 8 / bits : 1; }

template <int bits> struct WireOf { using type = uint8_t; };
template <> struct WireOf<8> { using type = int8_t; };
template <> struct WireOf<16> { using type = int16_t; };
template <int bits> using Wire = typename WireOf<bits>::type;

// Codes before they are packed: fields that need no more masking.
template <int bits> using Code = Wire<bits>;

INLINE uint32_t Bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

INLINE float Float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

INLINE uint32_t Mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

struct Seeds {
  uint32_t first, second;
};

Seeds SeedsOf(const uint32_t* key) {
  return {Mix(key[0] ^ Mix(key[1] + 0x9e3779b9u)),
          Mix(key[1] ^ Mix(key[0] + 0x7f4a7c15u))};
}

INLINE uint32_t Word(uint32_t index, Seeds seeds) {
  uint32_t x = index + seeds.first;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= seeds.second;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

INLINE float AbsMax(const float* x, int64_t n) {
  int32_t most = 0;  // magnitudes are ordered as their bits are
  for (int64_t i = 0; i < n; ++i) {
    const int32_t a = static_cast<int32_t>(Bits(x[i]) & 0x7fffffffu);
    most = std::max(most, a < static_cast<int32_t>(kInfinity) ? a : 0);
  }
  return Float(static_cast<uint32_t>(most));
}

// 2^shift / scale, 0 if no grid has that scale.
INLINE float Inverse(float scale, int shift) {
  const bool usable = scale >= kSmallest && Bits(scale) < kInfinity;
  return usable ? static_cast<float>(1 << shift) / scale : 0.0f;
}

template <int bits, bool stochastic>
INLINE void Encode(const float* x, int64_t n, float m, uint32_t index,
                   Seeds seeds, Code<bits>* out) {
  constexpr int kShift = bits == 1 ? 17 : Shift(bits);
  constexpr float kLimit = static_cast<float>(Levels(bits) << Shift(bits));
  constexpr float kWhole = 0x1p23f;  // floats from here on are integers
  constexpr int kMask = bits < 8 ? (1 << bits) - 1 : -1;
  const int32_t limit = static_cast<int32_t>(Bits(kLimit));
  for (int64_t i = 0; i < n; ++i) {
    // Sign and magnitude apart, in integers: compilers do not vectorize a
    // choice between floats for every instruction set.
    const uint32_t product = Bits(x[i] * m);
    const int32_t finite = -((Bits(x[i]) & 0x7fffffffu) < kInfinity);
    int32_t size = static_cast<int32_t>(product & 0x7fffffffu);
    size = std::min(size, limit) & finite;
    // Rounds to the nearest integer, halves to the even one.
    float y = (Float(size) + kWhole) - kWhole;
    if (bits == 16) {
      const int32_t whole = -(size >= static_cast<int32_t>(Bits(kWhole)));
      y = Float((size & whole) | (Bits(y) & ~whole));
    }
    const int32_t sign = static_cast<int32_t>(product) >> 31;
    const int32_t z = (static_cast<int32_t>(y) ^ sign) - sign;
    int32_t q;
    if (bits == 1 && !stochastic) {
      q = z >= 0;
    } else {
      const int32_t dither =
          stochastic ? static_cast<int32_t>(
                           Word(index + static_cast<uint32_t>(i), seeds) >>
                           (32 - kShift))
                     : 1 << (kShift - 1);
      q = (z + (bits == 1 ? 1 << 16 : 0) + dither) >> kShift;
    }
    out[i] = static_cast<Code<bits>>(q & kMask);
  }
}

template <int bits>
INLINE void Pack(const uint8_t* codes, int64_t row, uint8_t* out) {
  for (int64_t i = 0; i < row; ++i) {
    uint8_t byte = codes[i];
    for (int j = 1; j < Packing(bits); ++j) {
      byte |= static_cast<uint8_t>(codes[i + j * row] << (j * bits));
    }
    out[i] = byte;
  }
}

// Some blocks of one vector.
struct Blocks {
  const float* x;
  const float* given;  // scales, or null
  float* scale;
  void* packed;
  int64_t block;
  Seeds seeds;
  int64_t begin, end;
};

template <int bits, bool stochastic>
INLINE void EncodeBlocks(const Blocks& b) {
  const int64_t row = b.block / Packing(bits);
  alignas(64) uint8_t codes[kMaxBlock];
  for (int64_t i = b.begin; i < b.end; ++i) {
    const float* x = b.x + i * b.block;
    float scale;
    if (b.given) {
      scale = b.given[i];
    } else {
      scale = AbsMax(x, b.block) * (1.0f / Levels(bits));
      scale = scale < kSmallest ? 0.0f : scale;
    }
    b.scale[i] = scale;
    const float m = Inverse(scale, Shift(bits));
    const uint32_t index = static_cast<uint32_t>(i * b.block);
    Wire<bits>* out = static_cast<Wire<bits>*>(b.packed) + i * row;
    if constexpr (bits >= 8) {
      Encode<bits, stochastic>(x, b.block, m, index, b.seeds, out);
    } else {
      Encode<bits, stochastic>(x, b.block, m, index, b.seeds, codes);
      Pack<bits>(codes, row, out);
    }
  }
}

template <int bits>
INLINE void DecodeBlocks(const void* packed, const float* scale, float* x,
                   int64_t row, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const Wire<bits>* in = static_cast<const Wire<bits>*>(packed) + b * row;
    for (int j = 0; j < Packing(bits); ++j) {
      float* out = x + (b * Packing(bits) + j) * row;
      const float s = scale[b];
      for (int64_t i = 0; i < row; ++i) {
        int32_t q = in[i];
        if (bits == 1) {
          q = ((q >> j) & 1) * 2 - 1;
        } else if (bits < 8) {
          q = static_cast<int32_t>(static_cast<uint32_t>(q)
                                   << (32 - bits * (j + 1))) >>
              (32 - bits);
        }
        out[i] = static_cast<float>(q) * s;
      }
    }
  }
}

#define COMPILE_FOR(NAME, TARGET)                                       \
  template <int bits, bool stochastic>                                  \
  TARGET void EncodeBlocks##NAME(const Blocks& b) {                     \
    EncodeBlocks<bits, stochastic>(b);                                  \
  }                                                                     \
  template <int bits>                                                   \
  TARGET void DecodeBlocks##NAME(const void* packed, const float* scale,\
                           float* x, int64_t row, int64_t begin,        \
                           int64_t end) {                               \
    DecodeBlocks<bits>(packed, scale, x, row, begin, end);              \
  }

COMPILE_FOR(Base, )
#if defined(__x86_64__)
COMPILE_FOR(Avx2, AVX2)
COMPILE_FOR(Avx512, AVX512)
#endif

using EncodeFun = void (*)(const Blocks&);
using DecodeFun = void (*)(const void*, const float*, float*, int64_t, int64_t,
                           int64_t);

template <int bits, bool stochastic>
EncodeFun ChooseEncode() {
#if defined(__x86_64__)
  switch (fedjax_peft::Machine()) {
    case fedjax_peft::Isa::kAvx512: return EncodeBlocksAvx512<bits, stochastic>;
    case fedjax_peft::Isa::kAvx2: return EncodeBlocksAvx2<bits, stochastic>;
    default: break;
  }
#endif
  return EncodeBlocksBase<bits, stochastic>;
}

template <int bits>
DecodeFun ChooseDecode() {
#if defined(__x86_64__)
  switch (fedjax_peft::Machine()) {
    case fedjax_peft::Isa::kAvx512: return DecodeBlocksAvx512<bits>;
    case fedjax_peft::Isa::kAvx2: return DecodeBlocksAvx2<bits>;
    default: break;
  }
#endif
  return DecodeBlocksBase<bits>;
}

template <int bits>
EncodeFun ChooseEncode(bool stochastic) {
  return stochastic ? ChooseEncode<bits, true>()
                    : ChooseEncode<bits, false>();
}

EncodeFun ChooseEncode(int bits, bool stochastic) {
  switch (bits) {
    case 1: return ChooseEncode<1>(stochastic);
    case 2: return ChooseEncode<2>(stochastic);
    case 4: return ChooseEncode<4>(stochastic);
    case 8: return ChooseEncode<8>(stochastic);
    case 16: return ChooseEncode<16>(stochastic);
    default: return nullptr;
  }
}

DecodeFun ChooseDecode(int bits) {
  switch (bits) {
    case 1: return ChooseDecode<1>();
    case 2: return ChooseDecode<2>();
    case 4: return ChooseDecode<4>();
    case 8: return ChooseDecode<8>();
    case 16: return ChooseDecode<16>();
    default: return nullptr;
  }
}

// Calls fun(vector, begin, end) on pieces of `vectors` times `blocks` blocks.
template <typename Fun>
void InPieces(ffi::ThreadPool pool, int64_t vectors, int64_t blocks,
              int64_t block, const Fun& fun) {
  const int64_t total = vectors * blocks;
  if (total == 0 || block == 0) return;
  const int64_t size = std::max<int64_t>(1, kPiece / block);
  fedjax_peft::ForEach(pool, (total + size - 1) / size, [&](int64_t piece) {
    int64_t at = piece * size;
    const int64_t stop = std::min(total, at + size);
    while (at < stop) {
      const int64_t vector = at / blocks, begin = at % blocks;
      const int64_t end = std::min(blocks, begin + stop - at);
      fun(vector, begin, end);
      at += end - begin;
    }
  });
}

ffi::Error Run(ffi::ThreadPool pool, ffi::Buffer<ffi::F32>& x,
               ffi::Buffer<ffi::U32>& key, const float* given,
               ffi::AnyBuffer& packed, ffi::Buffer<ffi::F32>& scale,
               int32_t bits, int32_t stochastic) {
  const auto dims = x.dimensions();
  const int64_t block = dims.back(), blocks = dims[dims.size() - 2];
  int64_t vectors = 1;
  for (size_t i = 0; i + 2 < dims.size(); ++i) vectors *= dims[i];
  const EncodeFun fun = ChooseEncode(bits, stochastic != 0);
  if (fun == nullptr || block > kMaxBlock) {
    return ffi::Error::InvalidArgument("no such bits or block");
  }
  const float* in = x.typed_data();
  const uint32_t* keys = key.typed_data();
  float* scales = scale.typed_data();
  char* out = static_cast<char*>(packed.untyped_data());
  const int64_t bytes =
      blocks * (block / Packing(bits)) * (bits == 16 ? 2 : 1);
  InPieces(pool, vectors, blocks, block,
           [&](int64_t v, int64_t begin, int64_t end) {
             fun({in + v * blocks * block, given ? given + v * blocks : nullptr,
                  scales + v * blocks, out + v * bytes, block,
                  SeedsOf(keys + 2 * v), begin, end});
           });
  return ffi::Error::Success();
}

ffi::Error OwnScale(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                    ffi::Buffer<ffi::U32> key,
                    ffi::Result<ffi::AnyBuffer> packed,
                    ffi::Result<ffi::Buffer<ffi::F32>> scale, int32_t bits,
                    int32_t stochastic) {
  return Run(pool, x, key, nullptr, *packed, *scale, bits, stochastic);
}

ffi::Error GivenScale(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                      ffi::Buffer<ffi::U32> key, ffi::Buffer<ffi::F32> given,
                      ffi::Result<ffi::AnyBuffer> packed,
                      ffi::Result<ffi::Buffer<ffi::F32>> scale, int32_t bits,
                      int32_t stochastic) {
  return Run(pool, x, key, given.typed_data(), *packed, *scale, bits,
             stochastic);
}

ffi::Error Decoded(ffi::ThreadPool pool, ffi::AnyBuffer packed,
                   ffi::Buffer<ffi::F32> scale,
                   ffi::Result<ffi::Buffer<ffi::F32>> x, int32_t bits) {
  const auto dims = packed.dimensions();
  const int64_t row = dims.back();
  int64_t blocks = 1;  // a block does not depend on its vector
  for (size_t i = 0; i + 1 < dims.size(); ++i) blocks *= dims[i];
  const DecodeFun fun = ChooseDecode(bits);
  if (fun == nullptr) return ffi::Error::InvalidArgument("no such bits");
  const void* in = packed.untyped_data();
  const float* scales = scale.typed_data();
  float* out = x->typed_data();
  InPieces(pool, 1, blocks, row * Packing(bits),
           [&](int64_t, int64_t begin, int64_t end) {
             fun(in, scales, out, row, begin, end);
           });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Quantize, OwnScale,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("bits")
                                  .Attr<int32_t>("stochastic"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(QuantizeOn, GivenScale,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("bits")
                                  .Attr<int32_t>("stochastic"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dequantize, Decoded,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("bits"));
