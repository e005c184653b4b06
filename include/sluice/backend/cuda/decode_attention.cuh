// SPDX-License-Identifier: MIT
/// Decode attention on the GPU: one launch rotates a step's query and key, appends key and value to
/// the cache, and attends over sinks and window (or the full cache), with keys split over the chip
/// and merged before the launch ends.
///
/// How it works. K and V go from memory straight into the registers in which the tensor cores want
/// them: no shared memory, no barrier, every warp streams tiles of 16 slots by itself, and the
/// order of slots does not matter to a softmax, so the ring's wrap costs nothing. Scores are
/// formed transposed (keys x queries), which lets the up to 8 query heads of a KV head fill the
/// narrow side of the matrix instruction, and so are outputs (channels x queries). Queries and
/// probabilities enter as the sum of two 16-bit numbers, which keeps 16 bits of them (bf16; 22 for
/// f16): the result is that of float32 queries, not of rounded ones. The new token's row is patched
/// into the registers of the one warp whose tile holds its slot; no launch waits for another's
/// store. Warps merge in shared memory, blocks of a cluster in that of their first, clusters
/// through a scratch that the last to arrive reads; the order of merging is that of the splits, so
/// repeated runs give the same bits.
///
/// Caches of 8-bit codes (int8_t, fp8_e4m3; a float scale a row, kv_codes.cuh) go the same way, two
/// tiles at a time, so that as many bytes are under way. Codes become f16, not bf16: both hold them
/// exactly, but f16 is one instruction for a pair (e4m3) or the shortest (int8), and gives queries
/// and probabilities 22 bits. Its range is small, so each query is multiplied by the power of two
/// that brings its largest channel next to 2^15, and a warp multiplies probabilities by their
/// values' scales and by the power of two that brings the largest scale it has seen there: nothing
/// overflows, and what is 2^-14 of the largest still has all 22 bits. Scores are multiplied by the
/// keys' scales in float32. The new token is attended to as it is stored.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/backend/cuda/decode_step.cuh"
#include "sluice/backend/cuda/decoder_shape.hpp"
#include "sluice/backend/cuda/kv_codes.cuh"
#include "sluice/backend/cuda/memory.cuh"
#include "sluice/core/element.hpp"

namespace sluice {

/// Extents of a layer's decode attention.
struct DecodeAttentionShape {
  std::int64_t num_qo_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;  ///< of queries, keys, values and outputs: 64, 80, 96, 128 or 256
};

/// How a launch is cut: each KV head of a sequence is divided among `splits` blocks of `warps`
/// warps, tile by tile; `cluster` blocks merge through shared memory (sm_90; a divisor of splits).
/// Which cut is best depends on the machine alone, no result's meaning does.
struct DecodeSchedule {
  int warps = 0;
  int splits = 0;
  int cluster = 1;

  friend bool operator==(const DecodeSchedule&, const DecodeSchedule&) = default;
};

/// The tensors of one layer's step, in device memory. Rows of channels are consecutive; strides
/// are in elements. Every row must start at a multiple of 16 bytes.
template <class Element>
struct DecodeAttentionTensors {
  const void* query = nullptr;    ///< [batch, num_qo_heads, head_dim] of `input_type`, not rotated
  const void* key = nullptr;      ///< [batch, num_kv_heads, head_dim] of `input_type`, not rotated
  const void* value = nullptr;    ///< [batch, num_kv_heads, head_dim] of `input_type`
  std::int64_t query_stride = 0;  ///< from sequence to sequence; the three may be one fused row
  std::int64_t key_stride = 0;
  std::int64_t value_stride = 0;
  ElementType input_type = ElementType::kBF16;  ///< kF32, kF16 or kBF16

  void* out = nullptr;   ///< [batch, num_qo_heads, head_dim] of `output_type`
  float* lse = nullptr;  ///< [batch, num_qo_heads] or null
  std::int64_t out_stride = 0;
  ElementType output_type = ElementType::kBF16;  ///< kF32, kF16 or kBF16

  Element* keys = nullptr;    ///< [batch, num_kv_heads, capacity, head_dim] by the strides
  Element* values = nullptr;  ///< the same strides
  std::int64_t sequence_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t token_stride = 0;

  /// Of caches of codes alone: [batch, num_kv_heads, capacity], by strides in floats, that of
  /// tokens being 1. A row's channels are its codes times its scale.
  float* key_scales = nullptr;
  float* value_scales = nullptr;
  std::int64_t scale_sequence_stride = 0;
  std::int64_t scale_head_stride = 0;
};

namespace detail {

inline constexpr int kDecodeTile = 16;  // slots of a tile
inline constexpr int kDecodeHeads = 8;  // query heads of a block: the narrow side of the product
inline constexpr int kWarpSize = 32;
/// Bytes that widen a shared row of queries so that two rows lie in different halves of the banks.
template <int kHeadDim>
inline constexpr int kQueryRow = (kHeadDim + 63) / 64 * 64 + 32;  // elements
/// Floats that widen a row of a warp's part, so that heads do not meet in one bank.
inline constexpr int kPartPadding = 8;
template <int kHeadDim>
inline constexpr int kMaxDecodeWarps = kHeadDim > 128 ? 8 : 12;

struct DecodeAttentionParams {
  const void* query;
  const void* key;
  const void* value;
  void* out;
  float* lse;
  std::uint16_t* keys;
  std::uint16_t* values;
  const DecodePlace* places;
  const float* rows;
  float* partials;  // [units, clusters, kDecodeHeads, head_dim]
  float2* states;   // [units, clusters, kDecodeHeads]: maximum (log2), sum
  int* arrivals;    // [units], zero between launches
  std::int64_t query_stride;
  std::int64_t key_stride;
  std::int64_t value_stride;
  std::int64_t out_stride;
  std::int64_t sequence_stride;
  std::int64_t head_stride;
  std::int64_t token_stride;
  int group;        // query heads per KV head
  int query_tiles;  // blocks that share a KV head
  int capacity;
  int sinks;
  int num_pairs;
  bool interleaved;
  bool early;  // launched before the previous kernel's end
  ElementType input_type;
  ElementType output_type;
  float scale_log2;   // sm_scale * log2(e)
  float* key_scales;  // these of caches of codes alone
  float* value_scales;
  std::int64_t scale_sequence_stride;
  std::int64_t scale_head_stride;
};

/// 16-bit arithmetic of one element type.
template <class Element>
struct Half;

template <>
struct Half<bf16> {
  /// Two floats, rounded to nearest even, the first in the low half.
  static __device__ std::uint32_t pack(float low, float high) {
    std::uint32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
  }
  static __device__ float low(std::uint32_t packed) { return __uint_as_float(packed << 16); }
  static __device__ float high(std::uint32_t packed) {
    return __uint_as_float(packed & 0xffff0000U);
  }
  static __device__ void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                      std::uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

template <>
struct Half<f16> {
  static __device__ float widen(std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ std::uint32_t pack(float low, float high) {
    std::uint32_t result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
  }
  static __device__ float low(std::uint32_t packed) {
    return widen(static_cast<std::uint16_t>(packed));
  }
  static __device__ float high(std::uint32_t packed) {
    return widen(static_cast<std::uint16_t>(packed >> 16));
  }
  static __device__ void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                      std::uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

/// Cache rows are read once per step: they should not push others out of the first-level cache.
/// Volatile, so that loads stay where they are written: ahead of what hides them.
__device__ inline void stream_load(std::uint32_t* to, const void* from,
                                   std::integral_constant<int, 4>) {
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(from));
}
__device__ inline void stream_load(std::uint32_t* to, const void* from,
                                   std::integral_constant<int, 2>) {
  asm volatile("ld.global.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "l"(from));
}
__device__ inline void stream_load(std::uint32_t* to, const void* from,
                                   std::integral_constant<int, 1>) {
  asm volatile("ld.global.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
}

__device__ inline void stream_load_half_word(std::uint32_t* to, const void* from) {
  std::uint16_t x;
  asm volatile("ld.global.L1::no_allocate.u16 %0, [%1];" : "=h"(x) : "l"(from));
  *to = x;
}
__device__ inline float stream_load_float(const float* from) {
  float x;
  asm volatile("ld.global.L1::no_allocate.L2::128B.f32 %0, [%1];" : "=f"(x) : "l"(from));
  return x;
}

/// Copies 16 bytes to shared memory beside the registers' loads: waiting for it does not wait for
/// them.
__device__ inline void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}
__device__ inline void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ inline void copies_wait() {
  asm volatile("cp.async.wait_group 0;" ::: "memory");
}

/// Transposes an 8 x 8 matrix of 16-bit elements across the warp.
__device__ inline std::uint32_t transpose(std::uint32_t packed) {
  std::uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(packed));
  return result;
}

/// Widens 16 bytes of inputs: 4 or 8 of them.
__device__ inline void widen_input(float* to, ElementType type, uint4 x) {
  const auto widen = [to](auto half) {
    using H = decltype(half);
    return [to](uint4 y) {
      reinterpret_cast<float4*>(to)[0] = {H::low(y.x), H::high(y.x), H::low(y.y), H::high(y.y)};
      reinterpret_cast<float4*>(to)[1] = {H::low(y.z), H::high(y.z), H::low(y.w), H::high(y.w)};
    };
  };
  if (type == ElementType::kBF16)
    widen(Half<bf16>{})(x);
  else if (type == ElementType::kF16)
    widen(Half<f16>{})(x);
  else
    *reinterpret_cast<uint4*>(to) = x;
}

/// The power of two that brings numbers below 2^(largest exponent + 1) next to the end of f16's
/// range: below 2^15. Exponents are biased as floats have them; small ones count as 2^-112.
struct HalfRange {
  std::uint32_t exponent = kLeast;
  static constexpr std::uint32_t kLeast = 15;

  HalfRange() = default;
  explicit __device__ HalfRange(std::uint32_t largest) : exponent(max(largest, kLeast)) {}
  __device__ float into() const { return __uint_as_float((268 - exponent) << 23); }
  __device__ float back() const { return __uint_as_float((exponent - 14) << 23); }
  /// Takes in a larger exponent. Returns what into() has become less by: of more than 2^126, 2^126.
  __device__ float widen(std::uint32_t largest) {
    const std::uint32_t grown = max(largest, exponent);
    const std::uint32_t by = min(grown - exponent, 126U);
    exponent = grown;
    return __uint_as_float((127 - by) << 23);
  }
};

/// e^(x ln 2), to two units in the last place; 0 for -infinity.
__device__ inline float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ inline void store_output(void* data, ElementType type, std::int64_t index, float4 x) {
  if (type == ElementType::kF32) {
    *reinterpret_cast<float4*>(static_cast<float*>(data) + index) = x;
  } else {
    const bool brain = type == ElementType::kBF16;
    const uint2 packed{brain ? Half<bf16>::pack(x.x, x.y) : Half<f16>::pack(x.x, x.y),
                       brain ? Half<bf16>::pack(x.z, x.w) : Half<f16>::pack(x.z, x.w)};
    *reinterpret_cast<uint2*>(static_cast<std::uint16_t*>(data) + index) = packed;
  }
}

/// One pair of a head after rotation, and the channels it stands in. Pairs beyond the rotated ones
/// pass through.
struct RotatedPair {
  int first;
  int second;
  float a;
  float b;
};

/// head: [head_dim]; row: [2 (cos, sin), num_pairs].
__device__ inline RotatedPair rotate_pair(int num_pairs, bool interleaved, const float* row,
                                          const float* head, int pair) {
  RotatedPair x;
  const bool rotated = pair < num_pairs;
  const bool halves = rotated && !interleaved;
  x.first = halves ? pair : 2 * pair;
  x.second = halves ? pair + num_pairs : 2 * pair + 1;
  const float a = head[x.first];
  const float b = head[x.second];
  const float cosine = rotated ? row[pair] : 1;
  const float sine = rotated ? row[num_pairs + pair] : 0;
  x.a = a * cosine - b * sine;
  x.b = b * cosine + a * sine;
  return x;
}

/// What a warp holds of 16 keys, rows g and g + 8 for lane 4 g + t: matrix A of K q^T. Channels are
/// permuted within runs of 32 so that a lane's share of a row is 16 consecutive bytes; queries are
/// read from shared memory by the same permutation.
template <int kHeadDim>
struct KeyFragment {
  std::uint32_t r[2][kHeadDim / 8];

  __device__ void load(const std::uint16_t* const (&row)[2], int t) {
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        stream_load(&r[half][4 * c], row[half] + 32 * c + 8 * t, std::integral_constant<int, 4>());
    if constexpr (kHeadDim % 32 == 16) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        stream_load(&r[half][kHeadDim / 8 - 2], row[half] + kHeadDim / 32 * 32 + 4 * t,
                    std::integral_constant<int, 2>());
    }
  }
  /// The first of the 8 channels that lane t has in run c of 32, of the 4 in the last run of 16.
  static __device__ constexpr int channel(int c, int t) {
    return 32 * c + (c < kHeadDim / 32 ? 8 : 4) * t;
  }
  /// Four of the channels: matrix A of one product.
  __device__ void operand(int c, int which, std::uint32_t (&a)[4]) const {
    const int i = 4 * c + 2 * which;
    a[0] = r[0][i];
    a[1] = r[1][i];
    a[2] = r[0][i + 1];
    a[3] = r[1][i + 1];
  }
  /// Replaces row `half` by one in shared memory.
  __device__ void patch(int half, const std::uint16_t* row, int t) {
    constexpr int kWhole = kHeadDim / 32 * 4;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      const int channel = i < kWhole ? i / 4 * 32 + 8 * t + 2 * (i % 4)
                                     : kHeadDim / 32 * 32 + 4 * t + 2 * (i - kWhole);
      const auto fresh = *reinterpret_cast<const std::uint32_t*>(row + channel);
      if (half == 0)
        r[0][i] = fresh;
      else
        r[1][i] = fresh;
    }
  }
};

/// What a warp holds of 16 values, slots 2 t, 2 t + 1, 2 t + 8, 2 t + 9 for lane 4 g + t: lane's
/// share of a row is consecutive again, register i holding two channels.
template <int kHeadDim>
struct ValueFragment {
  static constexpr int kRegisters = kHeadDim / 16;
  std::uint32_t r[4][kRegisters];

  /// The first of register i's two channels; the other follows.
  static __device__ constexpr int channel(int i, int g) {
    const int whole = kHeadDim / 64 * 4;
    if (i < whole) return i / 4 * 64 + 8 * g + 2 * (i % 4);
    const int pairs = kRegisters - whole;  // registers of the rest: 1, 2 or 3
    return kHeadDim / 64 * 64 + 2 * pairs * g + 2 * (i - whole);
  }
  __device__ void load(int j, const std::uint16_t* row, int g) {
#pragma unroll
    for (int c = 0; c < kHeadDim / 64; ++c)
      stream_load(&r[j][4 * c], row + 64 * c + 8 * g, std::integral_constant<int, 4>());
    constexpr int kRest = kHeadDim % 64 / 16;
    static_assert(kRest < 3, "no vector load of three registers");
    if constexpr (kRest > 0)
      stream_load(&r[j][kHeadDim / 64 * 4], row + kHeadDim / 64 * 64 + 2 * kRest * g,
                  std::integral_constant<int, kRest>());
  }
  /// What register i holds of a row in shared memory.
  static __device__ std::uint32_t part(const std::uint16_t* row, int i, int g) {
    return *reinterpret_cast<const std::uint32_t*>(row + channel(i, g));
  }
  /// Matrix A of the product for channels channel(i, g) and the next.
  __device__ void operand(int i, std::uint32_t (&a)[4]) const {
    a[0] = __byte_perm(r[0][i], r[1][i], 0x5410);
    a[1] = __byte_perm(r[0][i], r[1][i], 0x7632);
    a[2] = __byte_perm(r[2][i], r[3][i], 0x5410);
    a[3] = __byte_perm(r[2][i], r[3][i], 0x7632);
  }
};

/// KeyFragment of codes: 16 consecutive bytes are channels of a run of 64.
template <class Element, int kHeadDim>
struct CodeKeyFragment {
  static constexpr int kWhole = kHeadDim / 64 * 4;  // registers of whole runs
  static constexpr int kRest = kHeadDim % 64 / 16;  // and of the rest
  static constexpr int kRegisters = kHeadDim / 16;  // of a row
  std::uint32_t r[2][kRegisters];

  __device__ void load(const std::uint8_t* const (&row)[2], int t) {
    static_assert(kRest < 3, "no vector load of three registers");
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int c = 0; c < kHeadDim / 64; ++c)
        stream_load(&r[half][4 * c], row[half] + 64 * c + 16 * t, std::integral_constant<int, 4>());
      if constexpr (kRest > 0)
        stream_load(&r[half][kWhole], row[half] + 16 * kWhole + 4 * kRest * t,
                    std::integral_constant<int, kRest>());
    }
  }
  static __device__ constexpr int channel(int c, int t) {
    if (c < kWhole / 2) return c / 2 * 64 + 16 * t + c % 2 * 8;
    return 16 * kWhole + 4 * kRest * t;
  }
  __device__ void operand(int c, int which, std::uint32_t (&a)[4]) const {
    const int i = 2 * c + which;
    ByteCodes<Element>::widen(r[0][i], a[0], a[2]);
    ByteCodes<Element>::widen(r[1][i], a[1], a[3]);
  }
  /// Makes the compiler widen the codes again where they are used again: kept, they would take
  /// twice the registers of the codes. zero: 0, which the compiler must not know.
  __device__ void forget(std::uint32_t zero) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < kRegisters; ++i) r[half][i] ^= zero;
  }
  /// What register i holds of a row in shared memory.
  static __device__ std::uint32_t part(const std::uint8_t* row, int i, int t) {
    return *reinterpret_cast<const std::uint32_t*>(row + channel(i / 2, t) + i % 2 * 4);
  }
};

/// ValueFragment of codes: 16 consecutive bytes are channels of a run of 128, 8 of one of 64.
template <class Element, int kHeadDim>
struct CodeValueFragment {
  static constexpr int kWhole = kHeadDim / 128 * 4;        // registers of whole runs,
  static constexpr int kEights = kHeadDim % 128 / 64 * 2;  // of the run of 64,
  static constexpr int kRest = kHeadDim % 64 / 16;         // bytes of the rest, by two
  static constexpr int kRegisters = kWhole + kEights + (kRest + 1) / 2;
  std::uint32_t r[4][kRegisters];

  /// The first of the two channels of product i; the other follows. Register i / 2 holds them.
  static __device__ constexpr int channel(int i, int g) {
    if (i < 2 * kWhole) return i / 8 * 128 + 16 * g + 2 * (i % 8);
    const int beyond = i - 2 * kWhole;
    if (beyond < 2 * kEights) return 32 * kWhole + 8 * g + 2 * beyond;
    return 32 * (kWhole + kEights) + 2 * kRest * g + 2 * (beyond - 2 * kEights);
  }
  __device__ void load(int j, const std::uint8_t* row, int g) {
#pragma unroll
    for (int c = 0; c < kHeadDim / 128; ++c)
      stream_load(&r[j][4 * c], row + 128 * c + 16 * g, std::integral_constant<int, 4>());
    if constexpr (kEights > 0)
      stream_load(&r[j][kWhole], row + channel(2 * kWhole, g), std::integral_constant<int, 2>());
    static_assert(kRest < 3, "no vector load of three registers");
    if constexpr (kRest == 2)
      stream_load(&r[j][kRegisters - 1], row + channel(2 * kRegisters - 2, g),
                  std::integral_constant<int, 1>());
    if constexpr (kRest == 1)
      stream_load_half_word(&r[j][kRegisters - 1], row + channel(2 * kRegisters - 2, g));
  }
  static __device__ std::uint32_t part(const std::uint8_t* row, int i, int g) {
    const std::uint8_t* const from = row + channel(2 * i, g);
    if (kRest == 1 && i == kRegisters - 1) return *reinterpret_cast<const std::uint16_t*>(from);
    return *reinterpret_cast<const std::uint32_t*>(from);
  }
  __device__ void operand(int i, std::uint32_t (&a)[4]) const {
    const unsigned bytes = i % 2 == 0 ? 0x5140 : 0x7362;  // slot by slot in each channel
    ByteCodes<Element>::widen(__byte_perm(r[0][i / 2], r[1][i / 2], bytes), a[0], a[1]);
    ByteCodes<Element>::widen(__byte_perm(r[2][i / 2], r[3][i / 2], bytes), a[2], a[3]);
  }
};

/// How decode attention reads rows of a type. kParts: runs of kDecodeTile slots that a warp has in
/// hand at once.
template <class Element, int kHeadDim>
struct CachedRows {
  using H = Half<Element>;
  using Stored = std::uint16_t;
  using Keys = KeyFragment<kHeadDim>;
  using Values = ValueFragment<kHeadDim>;
  static constexpr int kParts = 1;
  static constexpr int kQueryRow = detail::kQueryRow<kHeadDim>;
  static constexpr int kPart = kHeadDim + kPartPadding;
};
template <class Element, int kHeadDim>
requires(CudaCode<Element>) struct CachedRows<Element, kHeadDim> {
  using H = Half<f16>;
  using Stored = std::uint8_t;
  using Keys = CodeKeyFragment<Element, kHeadDim>;
  using Values = CodeValueFragment<Element, kHeadDim>;
  // As many registers as 16-bit rows take; of rows of 256, the second part's would be spilled.
  static constexpr int kParts = kHeadDim > 128 ? 1 : 2;
  // A row an odd multiple of 16 bytes, as lanes stand 32 bytes apart.
  static constexpr int kQueryRow = kHeadDim + 8;
  static constexpr int kPart = kHeadDim + kPartPadding / 2;
};

template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kMaxDecodeWarps<kHeadDim>* kWarpSize, 1)
    decode_attention_kernel(const __grid_constant__ DecodeAttentionParams p) {
  using Rows = CachedRows<Element, kHeadDim>;
  using H = typename Rows::H;
  using Stored = typename Rows::Stored;
  using Values = typename Rows::Values;
  constexpr bool kScaled = CudaCode<Element>;
  constexpr int kParts = Rows::kParts;
  constexpr int kTile = kParts * kDecodeTile;
  constexpr int kRow = Rows::kQueryRow;
  constexpr int kChannelTiles = kHeadDim / 16;
  constexpr int kPart = Rows::kPart;
  const float kInfinity = __int_as_float(0x7f800000);

  // Queries by place (own, sinks), part (high, low) and head; scaled into base-2 scores.
  __shared__ __align__(16) std::uint16_t queries[2][2][kDecodeHeads][kRow];
  __shared__ __align__(16) Stored new_rows[2][kHeadDim];  // key, value
  __shared__ float new_scales[2];                         // these of codes alone
  __shared__ float query_scales[2][kDecodeHeads];         // what scores are multiplied by
  __shared__ int last_block;
  __shared__ std::uint64_t arrived;  // bytes from the other blocks of the cluster
  // First the step's inputs as they came; in the end the warps' parts [warps, heads, head_dim] and
  // states [warps, heads], then the same of a cluster's blocks.
  extern __shared__ __align__(16) unsigned char dynamic[];

  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int splits = static_cast<int>(gridDim.x);
  const int split = static_cast<int>(blockIdx.x);
  int kv_head = static_cast<int>(blockIdx.y);
  int query_tile = 0;
  if (p.query_tiles > 1) {
    kv_head /= p.query_tiles;
    query_tile = static_cast<int>(blockIdx.y) - kv_head * p.query_tiles;
  }
  const std::int64_t sequence = blockIdx.z;
  const std::int64_t unit = sequence * gridDim.y + blockIdx.y;
  const int tid = static_cast<int>(threadIdx.x);
  const int warp = tid / kWarpSize;
  const int lane = tid % kWarpSize;
  const int g = lane / 4;
  const int t = lane % 4;
  const int heads = min(kDecodeHeads, p.group - query_tile * kDecodeHeads);
  const std::int64_t first_head =
      static_cast<std::int64_t>(kv_head) * p.group + query_tile * kDecodeHeads;
  const int threads = static_cast<int>(blockDim.x);
  const ClusterPlace cluster = cluster_place();

  Stored* const keys =
      reinterpret_cast<Stored*>(p.keys) + sequence * p.sequence_stride + kv_head * p.head_stride;
  Stored* const values =
      reinterpret_cast<Stored*>(p.values) + sequence * p.sequence_stride + kv_head * p.head_stride;
  const std::int64_t first_scale =
      kScaled ? sequence * p.scale_sequence_stride + kv_head * p.scale_head_stride : 0;

  typename Rows::Keys key[kParts];
  Values value[kParts];
  float key_scale[kParts][2];  // of slots g and g + 8, as key_slot() has them
  float value_scale[kParts][2];
  // Slots within a tile: of a lane's keys and scores, and of its values.
  const auto key_slot = [&](int part, int half) {
    return part * kDecodeTile + g + 8 * half;
  };
  const auto value_slot = [&](int part, int j) {
    return part * kDecodeTile + 2 * t + (j & 1) + 8 * (j >> 1);
  };
  // Slots beyond the capacity are read as the last one and masked.
  const auto load_scales = [&](const float* scales, int tile, float(&to)[kParts][2]) {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        to[part][half] = stream_load_float(
            scales + first_scale + min(tile * kTile + key_slot(part, half), p.capacity - 1));
  };
  const auto load_keys = [&](int tile) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const Stored* rows[2];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        rows[half] =
            keys + min(tile * kTile + key_slot(part, half), p.capacity - 1) * p.token_stride;
      key[part].load(rows, t);
    }
    if constexpr (kScaled) load_scales(p.key_scales, tile, key_scale);
  };
  const auto load_values = [&](int tile) {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        value[part].load(
            j, values + min(tile * kTile + value_slot(part, j), p.capacity - 1) * p.token_stride,
            g);
    if constexpr (kScaled) load_scales(p.value_scales, tile, value_scale);
  };

  if (cluster.size > 1 && tid == 0) byte_barrier_init(&arrived);

  // Tiles go round the blocks, then round their warps. Which slots are in use is not known yet, but
  // the first tile most likely is, and if this launch is early, old rows may be fetched before the
  // previous kernel ends: nothing but this launch writes the cache.
  int tile = warp * splits + split;
  if (p.early) {
    load_keys(tile);
    load_values(tile);
  }
  wait_for_previous_kernel();
  let_next_kernel_start();

  // Everything that the step brings comes in one round of loads, ahead of the cache's rows, which
  // would hold it up: queries, key, value, rotations.
  DecodePlace place;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(place.extent), "=r"(place.slot), "=r"(place.live), "=r"(place.newest)
               : "l"(p.places + sequence));
  const int per_vector = p.input_type == ElementType::kF32 ? 4 : 8;
  const int inputs_count = (heads + 2) * kHeadDim;
  float* const inputs = reinterpret_cast<float*>(dynamic);  // [heads + 2 (key, value), head_dim]
  float* const own_row = inputs + inputs_count;  // [2 (own, sinks), 2 (cos, sin), num_pairs]
  uint4* const raw = reinterpret_cast<uint4*>(own_row + 4 * p.num_pairs);  // inputs as they come
  for (int i = tid; i * per_vector < inputs_count; i += threads) {
    const int head = i * per_vector / kHeadDim;
    const void* data = p.query;
    std::int64_t first = sequence * p.query_stride + first_head * kHeadDim + i * per_vector;
    if (head >= heads) {
      const bool is_key = head == heads;
      data = is_key ? p.key : p.value;
      first = sequence * (is_key ? p.key_stride : p.value_stride) + (kv_head - head) * kHeadDim +
              i * per_vector;
    }
    copy_async(raw + i, static_cast<const unsigned char*>(data) + first * (16 / per_vector));
  }
  for (int i = tid; i < p.num_pairs; i += threads)
    copy_async(own_row + 4 * i, p.rows + (sequence * p.num_pairs + i) * 4);
  copies_commit();
  if (!p.early) load_keys(tile);
  copies_wait();  // each thread widens what it copied itself
  for (int i = tid; i * per_vector < inputs_count; i += threads)
    widen_input(inputs + i * per_vector, p.input_type, raw[i]);

  const int tiles = (place.extent + kTile - 1) / kTile;
  const int active = min(splits, tiles);  // blocks that have a tile
  if (place.extent <= 0) {
    // Idle: sees nothing. Full: there is no right answer, so the wrong one is made obvious.
    if (split != 0) return;
    const float nothing = place.extent == 0 ? 0 : __int_as_float(0x7fc00000);
    for (int e = tid; e < heads * kHeadDim / 4; e += threads)
      store_output(p.out, p.output_type,
                   sequence * p.out_stride + first_head * kHeadDim + std::int64_t{4} * e,
                   {nothing, nothing, nothing, nothing});
    if (p.lse != nullptr && tid < heads)
      p.lse[sequence * (gridDim.y / p.query_tiles) * p.group + first_head + tid] =
          place.extent == 0 ? -kInfinity : nothing;
    return;
  }
  if (split >= active) return;

  const int ring = p.capacity - p.sinks;
  const bool all_live = place.live >= place.extent - p.sinks;
  const int new_tile = place.slot / kTile;
  const bool has_sinks = split * kTile < p.sinks;
  __syncthreads();

  if constexpr (kScaled) {
    // A warp to a row, as its largest channel is asked for: key, value, own queries, sinks'
    // queries.
    constexpr int kQuads = (kHeadDim + 127) / 128;  // of a lane: two pairs each
    for (int row = warp; row < 2 + (has_sinks ? 2 * heads : heads); row += warps) {
      if (row == 1) {
        const float scale = quantise_row<Element, kHeadDim>(
            inputs + (heads + 1) * kHeadDim, reinterpret_cast<Element*>(new_rows[1]), lane);
        if (lane == 0) new_scales[1] = scale;
        continue;
      }
      const bool is_key = row == 0;
      const int which = row - 2 >= heads ? 1 : 0;
      const int head = is_key ? heads : row - 2 - which * heads;
      float4 x[kQuads];
      int channels[kQuads][4];
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        RotatedPair pairs[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int pair = (2 * i + j) * kWarpSize + lane;
          pairs[j] = {-1, -1, 0, 0};
          if (pair < kHeadDim / 2)
            pairs[j] = rotate_pair(p.num_pairs, p.interleaved, own_row + which * 2 * p.num_pairs,
                                   inputs + head * kHeadDim, pair);
          channels[i][2 * j] = pairs[j].first;
          channels[i][2 * j + 1] = pairs[j].second;
        }
        const float scale = is_key ? 1 : p.scale_log2;
        x[i] = {pairs[0].a * scale, pairs[0].b * scale, pairs[1].a * scale, pairs[1].b * scale};
      }
      if (is_key) {
        std::uint32_t codes[kQuads];
        const float scale = quantise_quads<Element>(x, codes);
#pragma unroll
        for (int i = 0; i < kQuads; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (channels[i][j] >= 0)
              new_rows[0][channels[i][j]] = static_cast<std::uint8_t>(codes[i] >> (8 * j));
        if (lane == 0) new_scales[0] = scale;
        continue;
      }
      const HalfRange range(peak_bits(x) >> 23);
      if (lane == 0) query_scales[which][head] = range.back();
      std::uint16_t* const high = queries[which][0][head];
      std::uint16_t* const low = queries[which][1][head];
#pragma unroll
      for (int i = 0; i < kQuads; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (channels[i][2 * j] < 0) continue;
          const float a = (j == 0 ? x[i].x : x[i].z) * range.into();
          const float b = (j == 0 ? x[i].y : x[i].w) * range.into();
          const std::uint32_t rounded = H::pack(a, b);
          const std::uint32_t rest = H::pack(a - H::low(rounded), b - H::high(rounded));
          high[channels[i][2 * j]] = static_cast<std::uint16_t>(rounded);
          high[channels[i][2 * j + 1]] = static_cast<std::uint16_t>(rounded >> 16);
          low[channels[i][2 * j]] = static_cast<std::uint16_t>(rest);
          low[channels[i][2 * j + 1]] = static_cast<std::uint16_t>(rest >> 16);
        }
    }
  } else {
    // Rotates queries and key; rows: own queries, the key (and the value beside it), sinks'
    // queries.
    const int pairs = (has_sinks ? 2 * heads + 1 : heads + 1) * (kHeadDim / 2);
    for (int e = tid; e < pairs; e += threads) {
      const int row = e / (kHeadDim / 2);
      const int pair = e % (kHeadDim / 2);
      const int which = row > heads ? 1 : 0;
      const int head = which == 1 ? row - heads - 1 : row;
      const RotatedPair x =
          rotate_pair(p.num_pairs, p.interleaved, own_row + which * 2 * p.num_pairs,
                      inputs + head * kHeadDim, pair);
      const float scale = row == heads ? 1 : p.scale_log2;
      const float a = x.a * scale;
      const float b = x.b * scale;
      const std::uint32_t high = H::pack(a, b);
      std::uint16_t* const to = row == heads ? new_rows[0] : queries[which][0][head];
      to[x.first] = static_cast<std::uint16_t>(high);
      to[x.second] = static_cast<std::uint16_t>(high >> 16);
      if (row == heads) {
        const float2 v =
            *reinterpret_cast<const float2*>(inputs + (heads + 1) * kHeadDim + 2 * pair);
        *reinterpret_cast<std::uint32_t*>(&new_rows[1][2 * pair]) = H::pack(v.x, v.y);
      } else {
        const std::uint32_t low = H::pack(a - H::low(high), b - H::high(high));
        queries[which][1][head][x.first] = static_cast<std::uint16_t>(low);
        queries[which][1][head][x.second] = static_cast<std::uint16_t>(low >> 16);
      }
    }
  }
  if (!p.early) load_values(tile);
  __syncthreads();
  if (cluster.size > 1) cluster_arrive();  // this block has done with its inputs in shared memory

  // Scores, [parts, 16 slots, 8 heads]: slots g, g + 8; heads 2 t, 2 t + 1.
  const auto scores = [&](int which, float(&s)[kParts][4]) {
    constexpr int kChains = 2 / kParts;  // matrix instructions wait for their accumulator
    float high[kParts][kChains][4] = {};
    float low[kParts][kChains][4] = {};
    const int head = min(g, heads - 1);  // columns without a head repeat the last, and are dropped
    const std::uint16_t* const q_high = queries[which][0][head];
    const std::uint16_t* const q_low = queries[which][1][head];
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c) {
      const int channel = Rows::Keys::channel(c, t);
      const uint4 qh = *reinterpret_cast<const uint4*>(q_high + channel);
      const uint4 ql = *reinterpret_cast<const uint4*>(q_low + channel);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        std::uint32_t a0[4];
        std::uint32_t a1[4];
        key[part].operand(c, 0, a0);
        key[part].operand(c, 1, a1);
        H::multiply_add(high[part][0], a0, qh.x, qh.y);
        H::multiply_add(low[part][0], a0, ql.x, ql.y);
        H::multiply_add(high[part][kChains - 1], a1, qh.z, qh.w);
        H::multiply_add(low[part][kChains - 1], a1, ql.z, ql.w);
      }
    }
    if constexpr (kHeadDim % 32 == 16) {
      const int channel = Rows::Keys::channel(kHeadDim / 32, t);
      const uint2 qh = *reinterpret_cast<const uint2*>(q_high + channel);
      const uint2 ql = *reinterpret_cast<const uint2*>(q_low + channel);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        std::uint32_t a[4];
        key[part].operand(kHeadDim / 32, 0, a);
        H::multiply_add(high[part][0], a, qh.x, qh.y);
        H::multiply_add(low[part][0], a, ql.x, ql.y);
      }
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kChains == 1)
          s[part][i] = high[part][0][i] + low[part][0][i];
        else
          s[part][i] = (high[part][0][i] + high[part][1][i]) + (low[part][0][i] + low[part][1][i]);
        if constexpr (kScaled) s[part][i] *= query_scales[which][min(2 * t + i % 2, heads - 1)];
      }
  };
  const auto visible = [&](int slot) {
    if (slot >= place.extent) return false;
    if (slot < p.sinks) return true;
    const int age = place.newest - (slot - p.sinks);
    return (age < 0 ? age + ring : age) < place.live;
  };

  // Heads 2 t and 2 t + 1: running maximum (the same in all lanes of a t), own share of the sum.
  float maximum[2] = {-kInfinity, -kInfinity};
  float sum[2] = {0, 0};
  float out[kChannelTiles][4] = {};  // channels x heads: (c, 2t), (c, 2t+1), (c+1, 2t), (c+1, 2t+1)

  HalfRange range;  // of the values' scales; `out` is multiplied by what goes into it

  while (tile < tiles) {
    const int slot0 = tile * kTile;
    const int next = tile + warps * splits;
    const bool whole = slot0 + kTile <= place.extent && all_live;  // every slot is visible
    const int new_slot = tile == new_tile ? place.slot - slot0 : -1;
    if (new_slot >= 0) {
      if constexpr (kScaled) {
#pragma unroll
        for (int i = 0; i < Rows::Keys::kRegisters; ++i) {
          const std::uint32_t fresh = Rows::Keys::part(new_rows[0], i, t);
#pragma unroll
          for (int part = 0; part < kParts; ++part)
#pragma unroll
            for (int half = 0; half < 2; ++half)
              if (key_slot(part, half) == new_slot) key[part].r[half][i] = fresh;
        }
      } else {
        if (g == new_slot % 8) key[0].patch(new_slot / 8, new_rows[0], t);
      }
      if (query_tile == 0) {  // appends; blocks that share a KV head do so once
        constexpr int kVector = 16 / static_cast<int>(sizeof(Stored));
        for (int i = lane; i < 2 * kHeadDim / kVector; i += kWarpSize) {
          const bool is_key = i < kHeadDim / kVector;
          const int channel = (is_key ? i : i - kHeadDim / kVector) * kVector;
          *reinterpret_cast<uint4*>((is_key ? keys : values) + place.slot * p.token_stride +
                                    channel) =
              *reinterpret_cast<const uint4*>(&new_rows[is_key ? 0 : 1][channel]);
        }
        if constexpr (kScaled) {
          if (lane < 2)
            (lane == 0 ? p.key_scales : p.value_scales)[first_scale + place.slot] =
                new_scales[lane];
        }
      }
    }
    float s[kParts][4];
    scores(0, s);
    if (slot0 < p.sinks) {
      float at_sinks[kParts][4];
      if constexpr (kScaled) {
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          key[part].forget(static_cast<std::uint32_t>(p.sinks) >> 31);
      }
      scores(1, at_sinks);
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (slot0 + key_slot(part, i / 2) < p.sinks) s[part][i] = at_sinks[part][i];
    }
    if constexpr (kScaled) {
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool is_new = key_slot(part, i / 2) == new_slot;
          s[part][i] *= is_new ? new_scales[0] : key_scale[part][i / 2];
        }
    }
    if (!whole) {
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (!visible(slot0 + key_slot(part, i / 2))) s[part][i] = -kInfinity;
    }
    if (next < tiles) load_keys(next);

    std::uint32_t high[kParts]
                      [2];  // probabilities, heads x slots: rows are heads after transposing
    std::uint32_t low[kParts][2];
    float factor[2];
    float probability[kParts][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = fmaxf(s[0][i], s[0][i + 2]);
#pragma unroll
      for (int part = 1; part < kParts; ++part)
        most = fmaxf(most, fmaxf(s[part][i], s[part][i + 2]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 4));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 8));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 16));
      most = fmaxf(most, maximum[i]);
      const float base = most == -kInfinity ? 0 : most;  // nothing seen yet: e^-inf, not NaN
      factor[i] = power_of_two(maximum[i] - base);
      maximum[i] = most;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        probability[part][i] = power_of_two(s[part][i] - base);
        probability[part][i + 2] = power_of_two(s[part][i + 2] - base);
      }
      float tile_sum = probability[0][i] + probability[0][i + 2];
#pragma unroll
      for (int part = 1; part < kParts; ++part)
        tile_sum += probability[part][i] + probability[part][i + 2];
      sum[i] = sum[i] * factor[i] + tile_sum;
    }
    if constexpr (kScaled) {
      std::uint32_t largest = 0;
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& scale = value_scale[part][half];
          if (key_slot(part, half) == new_slot) scale = new_scales[1];
          if (!whole && !visible(slot0 + key_slot(part, half))) scale = 0;  // it may be NaN
          largest = max(largest, __float_as_uint(scale));
        }
      const float shrink = range.widen(__reduce_max_sync(0xffffffffU, largest) >> 23);
      factor[0] *= shrink;
      factor[1] *= shrink;
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int i = 0; i < 4; ++i) probability[part][i] *= value_scale[part][i / 2] * range.into();
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float a = probability[part][2 * half];
        const float b = probability[part][2 * half + 1];
        const std::uint32_t rounded = H::pack(a, b);
        high[part][half] = transpose(rounded);
        low[part][half] = transpose(H::pack(a - H::low(rounded), b - H::high(rounded)));
      }
    if (__any_sync(0xffffffffU, factor[0] != 1 || factor[1] != 1)) {
#pragma unroll
      for (int i = 0; i < kChannelTiles; ++i) {
        out[i][0] *= factor[0];
        out[i][1] *= factor[1];
        out[i][2] *= factor[0];
        out[i][3] *= factor[1];
      }
    }
    if (!whole) {
      // A slot that nobody sees may hold anything, NaN included, and 0 * NaN is not 0.
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (visible(slot0 + value_slot(part, j))) continue;
#pragma unroll
          for (int i = 0; i < Values::kRegisters; ++i) value[part].r[j][i] = 0;
        }
    }
    if (new_slot >= 0) {
#pragma unroll
      for (int i = 0; i < Values::kRegisters; ++i) {
        const std::uint32_t fresh = Values::part(new_rows[1], i, g);
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (value_slot(part, j) == new_slot) value[part].r[j][i] = fresh;
      }
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int i = 0; i < kChannelTiles; ++i) {
        std::uint32_t a[4];
        value[part].operand(i, a);
        H::multiply_add(out[i], a, high[part][0], high[part][1]);
        H::multiply_add(out[i], a, low[part][0], low[part][1]);
      }
    if (next < tiles) load_values(next);
    tile = next;
  }
  if constexpr (kScaled) {
#pragma unroll
    for (int i = 0; i < kChannelTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i][j] *= range.back();
  }

  // Warps leave their part in shared memory.
  float* const warp_parts = reinterpret_cast<float*>(dynamic);
  float2* const warp_states = reinterpret_cast<float2*>(warp_parts + warps * heads * kPart);
  float* const block_parts = reinterpret_cast<float*>(warp_states + (warps * heads + 1) / 2 * 2);
  float2* const block_states =
      reinterpret_cast<float2*>(block_parts + cluster.size * heads * kHeadDim);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] += __shfl_xor_sync(0xffffffffU, sum[i], 4);
    sum[i] += __shfl_xor_sync(0xffffffffU, sum[i], 8);
    sum[i] += __shfl_xor_sync(0xffffffffU, sum[i], 16);
    const int head = 2 * t + i;
    if (head >= heads) continue;
    if (g == 0) warp_states[warp * heads + head] = {maximum[i], sum[i]};
    float* const row = warp_parts + (warp * heads + head) * kPart;
    constexpr int kPaired = kHeadDim / 64 * 4;  // registers whose channels come four in a row
#pragma unroll
    for (int c = 0; c < kPaired; c += 2)
      *reinterpret_cast<float4*>(row + Values::channel(c, g)) = {out[c][i], out[c][i + 2],
                                                                 out[c + 1][i], out[c + 1][i + 2]};
#pragma unroll
    for (int c = kPaired; c < kChannelTiles; ++c)
      *reinterpret_cast<float2*>(row + Values::channel(c, g)) = {out[c][i], out[c][i + 2]};
  }
  __syncthreads();

  // Adds `count` parts up, in order, a batch of loads at a time. A part's weight is
  // 2^(its maximum - the highest).
  const auto merge = [&](auto batch, int count, const auto& state_of, const auto& part_of,
                         float4& total) {
    constexpr int kBatch = decltype(batch)::value;
    float most = -kInfinity;
    float weight_sum = 0;
    total = {0, 0, 0, 0};
    for (int first = 0; first < count; first += kBatch) {
      float2 states[kBatch];
      float4 parts[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int from = min(first + i, count - 1);
        states[i] = state_of(from);
        parts[i] = part_of(from);
        if (first + i >= count) states[i] = {-kInfinity, 0};
      }
      float grown = most;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) grown = fmaxf(grown, states[i].x);
      const float base = grown == -kInfinity ? 0 : grown;
      const float keep = power_of_two(most - base);
      most = grown;
      weight_sum *= keep;
      total = {total.x * keep, total.y * keep, total.z * keep, total.w * keep};
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float weight = power_of_two(states[i].x - base);
        weight_sum += states[i].y * weight;
        total.x += parts[i].x * weight;
        total.y += parts[i].y * weight;
        total.z += parts[i].z * weight;
        total.w += parts[i].w * weight;
      }
    }
    return float2{most, weight_sum};
  };
  const auto finish = [&](int head, int channel, float2 state, float4 total) {
    const float scale = state.y == 0 ? 0 : __fdividef(1, state.y);
    store_output(p.out, p.output_type,
                 sequence * p.out_stride + (first_head + head) * kHeadDim + channel,
                 {total.x * scale, total.y * scale, total.z * scale, total.w * scale});
    if (p.lse != nullptr && channel == 0)
      p.lse[sequence * (gridDim.y / p.query_tiles) * p.group + first_head + head] =
          (state.x + __log2f(state.y)) * 0.693147180559945309F;
  };
  const bool alone = active <= cluster.size;  // no other cluster has a part
  const int blocks = min(cluster.size, active - (split - cluster.rank));
  const auto leave = [&](int head, int channel, float2 state, float4 total) {
    if (alone) {
      finish(head, channel, state, total);
    } else {
      const std::int64_t part = (unit * cluster.count + cluster.index) * kDecodeHeads + head;
      *reinterpret_cast<float4*>(p.partials + part * kHeadDim + channel) = total;
      if (channel == 0) p.states[part] = state;
    }
  };

  const int quads = heads * (kHeadDim / 4);
  if (cluster.size > 1) cluster_wait();  // the first block's memory may be written
  for (int e = tid; e < quads; e += threads) {
    const int head = e / (kHeadDim / 4);
    const int channel = e % (kHeadDim / 4) * 4;
    float4 total;
    const float2 state = merge(
        std::integral_constant<int, 6>(), warps,
        [&](int i) { return warp_states[i * heads + head]; },
        [&](int i) {
          return *reinterpret_cast<const float4*>(warp_parts + (i * heads + head) * kPart +
                                                  channel);
        },
        total);
    if (blocks == 1) {
      leave(head, channel, state, total);
      continue;
    }
    float4* const part =
        reinterpret_cast<float4*>(block_parts + (cluster.rank * heads + head) * kHeadDim + channel);
    float2* const part_state = block_states + cluster.rank * heads + head;
    if (cluster.rank == 0) {
      *part = total;
      if (channel == 0) *part_state = state;
    } else {
      send_to_first_block(part, total, &arrived);
      if (channel == 0) send_to_first_block(part_state, state, &arrived);
    }
  }
  if (blocks > 1) {
    if (cluster.rank != 0) return;
    if (tid == 0)
      byte_barrier_expect(&arrived, (blocks - 1) * heads *
                                        (kHeadDim * static_cast<int>(sizeof(float)) +
                                         static_cast<int>(sizeof(float2))));
    __syncthreads();
    byte_barrier_wait(&arrived);
    for (int e = tid; e < quads; e += threads) {
      const int head = e / (kHeadDim / 4);
      const int channel = e % (kHeadDim / 4) * 4;
      float4 total;
      const float2 state = merge(
          std::integral_constant<int, 8>(), blocks,
          [&](int i) { return block_states[i * heads + head]; },
          [&](int i) {
            return *reinterpret_cast<const float4*>(block_parts + (i * heads + head) * kHeadDim +
                                                    channel);
          },
          total);
      leave(head, channel, state, total);
    }
  }
  if (alone) return;
  const int active_clusters = (active + cluster.size - 1) / cluster.size;

  // The cluster that arrives last merges all; it leaves the counter as it found it.
  __syncthreads();
  if (tid == 0) {
    __threadfence();
    const bool last = atomicAdd(p.arrivals + unit, 1) == active_clusters - 1;
    if (last) p.arrivals[unit] = 0;
    __threadfence();
    last_block = last ? 1 : 0;
  }
  __syncthreads();
  if (last_block == 0) return;
  for (int e = tid; e < quads; e += threads) {
    const int head = e / (kHeadDim / 4);
    const int channel = e % (kHeadDim / 4) * 4;
    const std::int64_t first = unit * cluster.count * kDecodeHeads + head;
    float4 total;
    const float2 state = merge(
        std::integral_constant<int, 8>(), active_clusters,
        [&](int i) { return __ldcg(p.states + first + i * kDecodeHeads); },
        [&](int i) {
          return __ldcg(reinterpret_cast<const float4*>(
              p.partials + (first + i * kDecodeHeads) * kHeadDim + channel));
        },
        total);
    finish(head, channel, state, total);
  }
}

}  // namespace detail

/// Scratch and schedule of decode_attention() for one shape; layers of a step share it. Only
/// construction allocates.
///
/// `overlap`: launches may start before the kernel before them in the stream has ended
/// (programmatic dependent launch, sm_90 and later) and fetch old cache rows meanwhile; everything
/// else waits.
/// The kernel directly before must then not write this layer's cache itself (a layer's own previous
/// step is never the kernel directly before: DecodeStep::advance() lies between).
template <class Element, int kHeadDim>
class DecodeAttentionPlan {
  using Rows = detail::CachedRows<Element, kHeadDim>;
  static_assert(std::is_same_v<Element, bf16> || std::is_same_v<Element, f16> || CudaCode<Element>,
                "decode attention caches bf16, f16, int8_t or fp8_e4m3");
  static_assert(kHeadDim == 64 || kHeadDim == 80 || kHeadDim == 96 || kHeadDim == 128 ||
                    kHeadDim == 256,
                "head sizes 64, 80, 96, 128 and 256 are built");

 public:
  /// Slots of a tile, the unit in which keys are divided among warps.
  static constexpr std::int64_t kTile = Rows::kParts * detail::kDecodeTile;

  /// \throws Error(kConfig, kShape) when extents do not fit; Error(kDevice).
  DecodeAttentionPlan(const DecodeAttentionShape& shape, const DecodeStepConfig& step, bool overlap,
                      DecodeSchedule schedule = {})
      : shape_(shape), overlap_(overlap) {
    const auto require = [](bool good, const char* field, const std::string& expected,
                            std::int64_t found) {
      if (!good)
        throw Error(ErrorCode::kShape, {"decode attention does not fit", "DecodeAttentionShape",
                                        field, expected, std::to_string(found)});
    };
    require(shape.head_dim == kHeadDim, "head_dim", std::to_string(kHeadDim), shape.head_dim);
    require(shape.num_kv_heads >= 1, "num_kv_heads", "at least 1", shape.num_kv_heads);
    require(shape.num_qo_heads >= 1 && shape.num_qo_heads % shape.num_kv_heads == 0, "num_qo_heads",
            "a multiple of num_kv_heads", shape.num_qo_heads);
    group_ = static_cast<int>(shape.num_qo_heads / shape.num_kv_heads);
    query_tiles_ = (group_ + detail::kDecodeHeads - 1) / detail::kDecodeHeads;
    batch_size_ = step.batch_size;
    units_ = step.batch_size * shape.num_kv_heads * query_tiles_;

    int device = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    int major = 0;
    check_cuda(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device),
               "cudaDeviceGetAttribute");
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
               "cudaDeviceGetAttribute");
    overlap_ = overlap_ && major >= 9;

    const bool chosen = schedule == DecodeSchedule{};
    schedule_ = chosen ? choose(units_, step, multiprocessors_, major >= 9, overlap_) : schedule;
    if (major < 9) schedule_.cluster = 1;
    require(schedule_.warps >= 1 && schedule_.warps <= detail::kMaxDecodeWarps<kHeadDim>,
            "schedule.warps", "1 to " + std::to_string(detail::kMaxDecodeWarps<kHeadDim>),
            schedule_.warps);
    require(schedule_.cluster >= 1 && schedule_.cluster <= 16, "schedule.cluster", "1 to 16",
            schedule_.cluster);
    require(schedule_.splits >= 1 && schedule_.splits % schedule_.cluster == 0, "schedule.splits",
            "a multiple of schedule.cluster", schedule_.splits);
    const std::int64_t parts =
        units_ * (schedule_.splits / std::min(schedule_.cluster, 8)) * detail::kDecodeHeads;
    partials_ = Buffer<float, cuda>(static_cast<std::size_t>(parts * kHeadDim));
    states_ = Buffer<float2, cuda>(static_cast<std::size_t>(parts));
    arrivals_ = Buffer<int, cuda>(static_cast<std::size_t>(units_));
    const int heads = std::min(group_, detail::kDecodeHeads);
    const auto parts_bytes = [&](int count) {
      const auto rows = static_cast<std::size_t>((count * heads + 1) / 2 * 2);
      return rows * (Rows::kPart * sizeof(float) + sizeof(float2));
    };
    const std::size_t input_bytes =  // as they came, and widened
        2 * (static_cast<std::size_t>((heads + 2) * kHeadDim) + 4 * step.frequencies.size()) *
        sizeof(float);
    shared_bytes_ =
        std::max(input_bytes, parts_bytes(schedule_.warps) +
                                  (schedule_.cluster > 1 ? parts_bytes(schedule_.cluster) : 0));
    check_cuda(cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes_)),
               "cudaFuncSetAttribute");
    if (schedule_.cluster > 8)  // more than every chip must offer
      check_cuda(cudaFuncSetAttribute(kernel_, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
                 "cudaFuncSetAttribute");
    if (schedule_.cluster > 8 && chosen && clusters_at_once() < 1) schedule_.cluster = 8;
  }

  const DecodeAttentionShape& shape() const { return shape_; }
  const DecodeSchedule& schedule() const { return schedule_; }

  /// The schedule for `units` KV heads (times sequences), as measured on an H100: a block on every
  /// multiprocessor, as far as powers of two go. But clusters of more than two find no room on all
  /// of a chip whose parts are no multiples of them: so half the blocks in clusters, or all of them
  /// in pairs where warps go round often and the next launch may fetch meanwhile.
  static DecodeSchedule choose(std::int64_t units, const DecodeStepConfig& step,
                               int multiprocessors, bool clusters, bool overlap) {
    const std::int64_t tiles = (step.capacity + kTile - 1) / kTile;
    constexpr std::int64_t kWarps = detail::kMaxDecodeWarps<kHeadDim>;
    const auto rounds_of = [&](std::int64_t splits) {
      return (tiles + splits * kWarps - 1) / (splits * kWarps);
    };
    std::int64_t splits = 1;
    while (splits < 64 && 2 * splits * units <= multiprocessors && 2 * splits <= tiles) splits *= 2;
    std::int64_t cluster = std::min<std::int64_t>(splits, 16);
    if (splits > 2 && 2 * splits * units > multiprocessors) {
      if (!overlap || rounds_of(splits / 2) <= 2) {
        splits /= 2;
        cluster = std::min<std::int64_t>(splits, 16);
      } else {
        cluster = 2;
      }
    }
    const std::int64_t rounds = rounds_of(splits);
    const std::int64_t warps = (tiles + splits * rounds - 1) / (splits * rounds);
    return {static_cast<int>(warps), static_cast<int>(splits),
            static_cast<int>(clusters ? cluster : 1)};
  }

  /// Launches one layer's step. `step` says where the sequences stand and is not changed. May be
  /// captured into a graph. Preconditions: alignment and extents as DecodeAttentionTensors says.
  /// \throws Error(kDevice) if the launch is refused.
  void launch(const DecodeStep& step, const DecodeAttentionTensors<Element>& x, float sm_scale,
              cudaStream_t stream) const {
    const DecodeStepConfig& config = step.config();
    const detail::DecodeAttentionParams params{.query = x.query,
                                               .key = x.key,
                                               .value = x.value,
                                               .out = x.out,
                                               .lse = x.lse,
                                               .keys = reinterpret_cast<std::uint16_t*>(x.keys),
                                               .values = reinterpret_cast<std::uint16_t*>(x.values),
                                               .places = step.places(),
                                               .rows = step.rows(),
                                               .partials = const_cast<float*>(partials_.data()),
                                               .states = const_cast<float2*>(states_.data()),
                                               .arrivals = const_cast<int*>(arrivals_.data()),
                                               .query_stride = x.query_stride,
                                               .key_stride = x.key_stride,
                                               .value_stride = x.value_stride,
                                               .out_stride = x.out_stride,
                                               .sequence_stride = x.sequence_stride,
                                               .head_stride = x.head_stride,
                                               .token_stride = x.token_stride,
                                               .group = group_,
                                               .query_tiles = query_tiles_,
                                               .capacity = static_cast<int>(config.capacity),
                                               .sinks = static_cast<int>(config.num_sink_tokens),
                                               .num_pairs = step.rotary_dim() / 2,
                                               .interleaved = config.interleaved,
                                               .early = overlap_,
                                               .input_type = x.input_type,
                                               .output_type = x.output_type,
                                               .scale_log2 = sm_scale * 1.44269504088896340736F,
                                               .key_scales = x.key_scales,
                                               .value_scales = x.value_scales,
                                               .scale_sequence_stride = x.scale_sequence_stride,
                                               .scale_head_stride = x.scale_head_stride};
    Launch launch(*this, stream);
    check_cuda(cudaLaunchKernelEx(&launch.config, kernel_, params), "decode_attention_kernel");
  }

 private:
  struct Launch {
    Launch(const DecodeAttentionPlan& plan, cudaStream_t stream) {
      config.gridDim = dim3(static_cast<unsigned>(plan.schedule_.splits),
                            static_cast<unsigned>(plan.shape_.num_kv_heads * plan.query_tiles_),
                            static_cast<unsigned>(plan.batch_size_));
      config.blockDim = dim3(static_cast<unsigned>(plan.schedule_.warps * detail::kWarpSize));
      config.dynamicSmemBytes = plan.shared_bytes_;
      config.stream = stream;
      config.attrs = attributes;
      if (plan.overlap_) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
      }
      if (plan.schedule_.cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x =
            static_cast<unsigned>(plan.schedule_.cluster);
        attributes[config.numAttrs].val.clusterDim.y = 1;
        attributes[config.numAttrs++].val.clusterDim.z = 1;
      }
    }
    Launch(const Launch&) = delete;  // config points into it
    Launch& operator=(const Launch&) = delete;

    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config{};
  };

  /// Clusters of the schedule's size that the device can run at once; 0 if it refuses the size.
  int clusters_at_once() const {
    const Launch launch(*this, nullptr);
    int count = 0;
    if (cudaOccupancyMaxActiveClusters(&count, kernel_, &launch.config) == cudaSuccess)
      return count;
    static_cast<void>(cudaGetLastError());
    return 0;
  }

  // What the attributes are set on (backend.cuh).
  void (*kernel_)(detail::DecodeAttentionParams) =
      detail::decode_attention_kernel<Element, kHeadDim>;
  DecodeAttentionShape shape_;
  bool overlap_;
  int group_ = 1;
  int query_tiles_ = 1;
  int multiprocessors_ = 0;
  std::int64_t batch_size_ = 1;
  std::int64_t units_ = 0;
  DecodeSchedule schedule_;
  std::size_t shared_bytes_ = 0;
  Buffer<float, cuda> partials_;
  Buffer<float2, cuda> states_;
  Buffer<int, cuda> arrivals_;
};

}  // namespace sluice
