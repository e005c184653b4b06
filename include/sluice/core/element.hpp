// SPDX-License-Identifier: MIT
/// Element types of tensors: the 16- and 8-bit floats with their conversions, and the tags that
/// files and weight matrices carry at run time. Block formats are described here by size only;
/// their layouts are in nn/quantised_blocks.hpp.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace sluice {

/// bfloat16: the upper half of a float32. Conversion rounds to nearest even; NaN stays NaN.
struct bf16 {
  std::uint16_t bits;

  bf16() = default;
  explicit constexpr bf16(float value) : bits(round(std::bit_cast<std::uint32_t>(value))) {}
  explicit constexpr operator float() const {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }
  static constexpr bf16 from_bits(std::uint16_t bits) {
    bf16 result{};
    result.bits = bits;
    return result;
  }

 private:
  static constexpr std::uint16_t round(std::uint32_t x) {
    if ((x & 0x7fffffffU) > 0x7f800000U) return static_cast<std::uint16_t>((x >> 16) | 0x40U);
    return static_cast<std::uint16_t>((x + 0x7fffU + ((x >> 16) & 1U)) >> 16);
  }
};

/// IEEE binary16. Conversion rounds to nearest even; overflow gives infinity, subnormals are kept.
struct f16 {
  std::uint16_t bits;

  f16() = default;
  explicit constexpr f16(float value) : bits(round(std::bit_cast<std::uint32_t>(value))) {}
  explicit constexpr operator float() const {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
    const std::uint32_t magnitude = bits & 0x7fffU;
    if (magnitude >= 0x7c00U)  // infinity, NaN
      return std::bit_cast<float>(sign | 0x7f800000U | ((magnitude & 0x3ffU) << 13));
    if (magnitude >= 0x0400U)  // normal: rebias the exponent from 15 to 127
      return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000U));
    const float subnormal = static_cast<float>(magnitude) * 0x1p-24F;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(subnormal));
  }
  static constexpr f16 from_bits(std::uint16_t bits) {
    f16 result{};
    result.bits = bits;
    return result;
  }

 private:
  // Without branches, so that compilers convert whole registers.
  static constexpr std::uint16_t round(std::uint32_t x) {
    constexpr std::uint32_t kSmallestNormal = 0x38800000U;
    const std::uint32_t sign = (x >> 16) & 0x8000U;
    const std::uint32_t magnitude = x & 0x7fffffffU;
    // A subnormal result: the float adder does the rounding.
    const std::uint32_t small = magnitude < kSmallestNormal ? magnitude : 0U;
    const std::uint32_t subnormal =
        std::bit_cast<std::uint32_t>(std::bit_cast<float>(small) + 0.5F) - 0x3f000000U;
    const std::uint32_t rebased = magnitude - 0x38000000U;
    const std::uint32_t normal = (rebased + 0xfffU + ((rebased >> 13) & 1U)) >> 13;
    std::uint32_t result = magnitude < kSmallestNormal ? subnormal : normal;
    result = magnitude >= 0x477ff000U ? 0x7c00U : result;
    result = magnitude > 0x7f800000U ? 0x7e00U : result;
    return static_cast<std::uint16_t>(sign | result);
  }
};

/// OCP FP8 E4M3: 4 bits of exponent with bias 7, 3 of mantissa, no infinity, one NaN a sign.
/// Conversion rounds to nearest even and saturates at 448, infinities too; subnormals (steps of
/// 2^-9) are kept, NaN stays NaN. (arXiv 2209.05433)
struct fp8_e4m3 {
  std::uint8_t bits;

  fp8_e4m3() = default;
  explicit constexpr fp8_e4m3(float value) : bits(round(std::bit_cast<std::uint32_t>(value))) {}
  explicit constexpr operator float() const {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x80U) << 24;
    const std::uint32_t magnitude = bits & 0x7fU;
    if (magnitude == 0x7fU) return std::bit_cast<float>(sign | 0x7fc00000U);
    if (magnitude >= 0x08U)  // normal: rebias the exponent from 7 to 127
      return std::bit_cast<float>(sign | ((magnitude << 20) + 0x3c000000U));
    const float subnormal = static_cast<float>(magnitude) * 0x1p-9F;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(subnormal));
  }
  static constexpr fp8_e4m3 from_bits(std::uint8_t bits) {
    fp8_e4m3 result{};
    result.bits = bits;
    return result;
  }

 private:
  static constexpr std::uint8_t round(std::uint32_t x) {
    const std::uint32_t sign = (x >> 24) & 0x80U;
    const std::uint32_t magnitude = x & 0x7fffffffU;
    if (magnitude > 0x7f800000U) return static_cast<std::uint8_t>(sign | 0x7fU);
    if (magnitude >= 0x43e00000U) return static_cast<std::uint8_t>(sign | 0x7eU);  // 448
    if (magnitude < 0x3c800000U) {  // below 2^-6: a float near 2^14 has steps of 2^-9
      const float shifted = std::bit_cast<float>(magnitude) + 0x1p14F;
      return static_cast<std::uint8_t>(sign |
                                       (std::bit_cast<std::uint32_t>(shifted) - 0x46800000U));
    }
    const std::uint32_t rebased = magnitude - 0x3c000000U;
    return static_cast<std::uint8_t>(sign | ((rebased + 0x7ffffU + ((rebased >> 20) & 1U)) >> 20));
  }
};

/// Two channels of a row in codes of 0 to 15: the even one in the high half of the byte.
struct int4x2 {
  std::uint8_t bits;
};

/// A channel of a row in blocks of 32, coded as GGUF's Q8_0: -127 to 127 times the block's scale.
struct q8_0 {
  std::int8_t bits;
};

/// Two channels of a row in blocks of 32, coded as GGUF's Q4_0: byte i of a block's 16 holds
/// channel i in its low half and channel i + 16 in its high one, 0 to 15 for -8 to 7 times the
/// block's scale.
struct q4_0 {
  std::uint8_t bits;
};

static_assert(sizeof(bf16) == 2 && sizeof(f16) == 2);
static_assert(sizeof(fp8_e4m3) == 1 && sizeof(int4x2) == 1);
static_assert(sizeof(q8_0) == 1 && sizeof(q4_0) == 1);

/// What a stored tensor's elements are. The Q names are GGUF's block formats.
enum class ElementType : std::uint8_t {
  kF32,
  kF16,
  kBF16,
  kQ8_0,
  kQ4_0,
  kQ4_1,
  kQ4_K,
  kQ6_K,
};

/// Values per block and bytes per block; plain types are blocks of one.
struct BlockShape {
  int values;
  int bytes;
};

constexpr BlockShape block_shape(ElementType type) {
  switch (type) {
    case ElementType::kF32: return {1, 4};
    case ElementType::kF16: return {1, 2};
    case ElementType::kBF16: return {1, 2};
    case ElementType::kQ8_0: return {32, 34};
    case ElementType::kQ4_0: return {32, 18};
    case ElementType::kQ4_1: return {32, 20};
    case ElementType::kQ4_K: return {256, 144};
    case ElementType::kQ6_K: return {256, 210};
  }
  return {1, 1};
}

constexpr std::string_view to_string(ElementType type) {
  switch (type) {
    case ElementType::kF32: return "F32";
    case ElementType::kF16: return "F16";
    case ElementType::kBF16: return "BF16";
    case ElementType::kQ8_0: return "Q8_0";
    case ElementType::kQ4_0: return "Q4_0";
    case ElementType::kQ4_1: return "Q4_1";
    case ElementType::kQ4_K: return "Q4_K";
    case ElementType::kQ6_K: return "Q6_K";
  }
  return "unknown";
}

/// The tag of a C++ element type that a cache or a weight matrix can hold.
template <class T>
inline constexpr ElementType element_type_of = ElementType::kF32;
template <>
inline constexpr ElementType element_type_of<f16> = ElementType::kF16;
template <>
inline constexpr ElementType element_type_of<bf16> = ElementType::kBF16;

}  // namespace sluice
