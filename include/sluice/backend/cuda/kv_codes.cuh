// SPDX-License-Identifier: MIT
/// Rows of 8-bit codes with a float scale each, on the device. A warp turns a row of floats into
/// codes and scale, bit for bit as the CPU does (KvRow in cache/kv_element.hpp, where the formats
/// are described), whatever the compiler's flags say of division and small numbers; words of four
/// codes become pairs of f16, exactly.
#pragma once

#include <cstdint>

#include "sluice/backend/cuda/decoder_shape.hpp"
#include "sluice/core/element.hpp"

namespace sluice::detail {

/// x / y in float32, rounded to nearest even, small numbers kept.
__device__ inline float divide(float x, float y) {
  float result;
  asm("div.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
}

/// fp8_e4m3(x) for an |x| that is finite, by integers: for GPUs that cannot convert.
__device__ inline std::uint32_t e4m3_bits(float x) {
  const std::uint32_t bits = __float_as_uint(x);
  const std::uint32_t sign = (bits >> 24) & 0x80U;
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude >= 0x43e00000U) return sign | 0x7eU;  // 448
  if (magnitude < 0x3c800000U) {  // below 2^-6: a float near 2^14 has steps of 2^-9
    const float shifted = __uint_as_float(magnitude) + 0x1p14F;
    return sign | (__float_as_uint(shifted) - 0x46800000U);
  }
  const std::uint32_t rebased = magnitude - 0x3c000000U;
  return sign | ((rebased + 0x7ffffU + ((rebased >> 20) & 1U)) >> 20);
}

/// Four codes of fp8_e4m3 as pairs of f16, the first in the low half, by integers: exponent and
/// mantissa in their places of an f16, times 2^8 for the exponents' other bias. The code of NaN,
/// which no quantised row holds, reads as 480.
__device__ inline void widen_e4m3_bits(std::uint32_t four, std::uint32_t& first,
                                       std::uint32_t& second) {
  const auto pair = [](std::uint32_t codes) {  // each in the high byte of its half
    const std::uint32_t moved = (codes & 0x80008000U) | ((codes >> 1) & 0x3f803f80U);
    std::uint32_t result;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(moved), "r"(0x5c005c00U));
    return result;
  };
  first = pair(__byte_perm(four, 0, 0x1404));
  second = pair(__byte_perm(four, 0, 0x3424));
}

/// What codes of a type are: kTop, the quotient by the row's scale that the largest |x| reaches.
template <class Element>
struct ByteCodes;

template <>
struct ByteCodes<std::int8_t> {
  static constexpr float kTop = 127;
  /// The codes of four quotients of at most about kTop, the first in the low byte.
  static __device__ std::uint32_t round(float4 n) {
    // Next to 1.5 * 2^23 floats are whole numbers, and their lowest byte is that of the number.
    constexpr float kMagic = 12582912;
    const auto whole = [](float x) {
      return __float_as_uint(__fadd_rn(x, kMagic));
    };
    return __byte_perm(__byte_perm(whole(n.x), whole(n.y), 0x0040),
                       __byte_perm(whole(n.z), whole(n.w), 0x0040), 0x5410);
  }
  /// Four codes as pairs of f16, the first in the low half: 1,152 + code, less 1,152.
  static __device__ void widen(std::uint32_t four, std::uint32_t& first, std::uint32_t& second) {
    const std::uint32_t raised = four ^ 0x80808080U;  // code + 128
    const auto pair = [](std::uint32_t magic) {
      std::uint32_t result;
      asm("add.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(magic), "r"(0xe480e480U));
      return result;
    };
    first = pair(__byte_perm(raised, 0x64646464U, 0x4140));
    second = pair(__byte_perm(raised, 0x64646464U, 0x4342));
  }
};

template <>
struct ByteCodes<fp8_e4m3> {
  static constexpr float kTop = 448;
  static __device__ std::uint32_t round(float4 n) {
#if __CUDA_ARCH__ >= 890
    std::uint32_t result;
    asm("{\n\t.reg .b16 low, high;\n\t"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n\t"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n\t"
        "mov.b32 %0, {low, high};\n\t}"
        : "=r"(result)
        : "f"(n.x), "f"(n.y), "f"(n.z), "f"(n.w));
    return result;
#else
    return e4m3_bits(n.x) | e4m3_bits(n.y) << 8 | e4m3_bits(n.z) << 16 | e4m3_bits(n.w) << 24;
#endif
  }
  static __device__ void widen(std::uint32_t four, std::uint32_t& first, std::uint32_t& second) {
#if __CUDA_ARCH__ >= 890
    asm("{\n\t.reg .b16 low, high;\n\t"
        "mov.b32 {low, high}, %2;\n\t"
        "cvt.rn.f16x2.e4m3x2 %0, low;\n\t"
        "cvt.rn.f16x2.e4m3x2 %1, high;\n\t}"
        : "=r"(first), "=r"(second)
        : "r"(four));
#else
    widen_e4m3_bits(four, first, second);
#endif
  }
};

/// The largest |x| of what all lanes of a warp hold, as bits; above those of infinity where one is
/// NaN. Call it with the whole warp.
template <int kQuads>
__device__ std::uint32_t peak_bits(const float4 (&x)[kQuads]) {
  std::uint32_t peak = 0;
#pragma unroll
  for (int i = 0; i < kQuads; ++i)
    for (const float value : {x[i].x, x[i].y, x[i].z, x[i].w})
      peak = max(peak, __float_as_uint(value) & 0x7fffffffU);
  return __reduce_max_sync(0xffffffffU, peak);
}

/// Quantises a row that the lanes of a warp hold in quads of channels, however dealt; lanes with
/// fewer quads hold zeros. codes: of the same channels, the first in the low byte. Returns the
/// row's scale, in every lane. A row with a NaN or an infinity has a scale of NaN and codes of 0.
/// Call it with the whole warp.
template <class Element, int kQuads>
__device__ float quantise_quads(const float4 (&x)[kQuads], std::uint32_t (&codes)[kQuads]) {
  using Codes = ByteCodes<Element>;
  const std::uint32_t peak = peak_bits(x);
  if (peak >= 0x7f800000U) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) codes[i] = 0;
    return __uint_as_float(0x7fc00000U);
  }
  const std::uint32_t smallest_normal = 0x00800000U;
  const float quotient = divide(__uint_as_float(peak), Codes::kTop);
  // Compared as bits, which no flag takes for zero.
  const float scale = __uint_as_float(max(__float_as_uint(quotient), smallest_normal));
#pragma unroll
  for (int i = 0; i < kQuads; ++i)
    codes[i] = Codes::round({divide(x[i].x, scale), divide(x[i].y, scale), divide(x[i].z, scale),
                             divide(x[i].w, scale)});
  return scale;
}

/// Quantises a row by the calling warp. from: [kHeadDim], at a multiple of 16 bytes; to:
/// [kHeadDim], at a multiple of 4; each in shared or global memory. Returns the row's scale, in
/// every lane; storing it is the caller's.
template <class Element, int kHeadDim>
__device__ float quantise_row(const float* from, Element* to, int lane) {
  static_assert(CudaCode<Element> && kHeadDim % 4 == 0);
  constexpr int kQuads = (kHeadDim + 127) / 128;
  float4 x[kQuads];
  std::uint32_t codes[kQuads];
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int channel = 128 * i + 4 * lane;
    x[i] =
        channel < kHeadDim ? *reinterpret_cast<const float4*>(from + channel) : float4{0, 0, 0, 0};
  }
  const float scale = quantise_quads<Element>(x, codes);
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int channel = 128 * i + 4 * lane;
    if (channel < kHeadDim) *reinterpret_cast<std::uint32_t*>(to + channel) = codes[i];
  }
  return scale;
}

}  // namespace sluice::detail
