// SPDX-License-Identifier: MIT
#include "sluice/core/element.hpp"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <set>
#include <string>

#include <gtest/gtest.h>

#include "sluice/core/random.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

constexpr std::uint32_t kAllHalves = 0x10000;

bool is_nan_half(std::uint32_t bits) {
  return (bits & 0x7fffU) > 0x7c00U;
}

// The value of a binary16 pattern by its definition, in double.
double half_value(std::uint32_t bits) {
  const double sign = (bits & 0x8000U) != 0 ? -1.0 : 1.0;
  const int exponent = static_cast<int>((bits >> 10) & 31U);
  const double fraction = static_cast<double>(bits & 0x3ffU) / 1024.0;
  if (exponent == 31) return fraction == 0 ? sign * HUGE_VAL : std::nan("");
  if (exponent == 0) return sign * std::ldexp(fraction, -14);
  return sign * std::ldexp(1.0 + fraction, exponent - 15);
}

// Rounding by definition: scale so that one unit in the last place is 1, round half to even in the
// floating-point unit (exact in double), scale back.
double nearest_half(double value) {
  if (!std::isfinite(value)) return value;
  int exponent = 0;
  std::frexp(value, &exponent);  // |value| in [2^(e-1), 2^e)
  const int last_place = std::max(exponent - 11, -24);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -last_place)), last_place);
  return std::abs(rounded) > 65504.0 ? std::copysign(HUGE_VAL, rounded) : rounded;
}

void expect_rounds_like_definition(std::uint32_t pattern) {
  const float value = std::bit_cast<float>(pattern);
  const f16 converted(value);
  if (std::isnan(value)) {
    ASSERT_TRUE(is_nan_half(converted.bits)) << std::hex << pattern;
    ASSERT_EQ(converted.bits >> 15, pattern >> 31);
    return;
  }
  const double expected = nearest_half(value);
  ASSERT_EQ(half_value(converted.bits), expected) << std::hex << pattern;
  ASSERT_EQ(converted.bits >> 15, pattern >> 31) << "sign of " << std::hex << pattern;
// On Arm GCC has the type in C++ since version 13.
#if defined(__FLT16_MANT_DIG__) && !defined(__clang__) && !(defined(__aarch64__) && __GNUC__ < 13)
  const _Float16 compilers = static_cast<_Float16>(value);
  ASSERT_EQ(converted.bits, std::bit_cast<std::uint16_t>(compilers)) << std::hex << pattern;
#endif
}

TEST(F16, EveryPatternHasItsValueAndComesBack) {
  for (std::uint32_t bits = 0; bits < kAllHalves; ++bits) {
    const auto half = f16::from_bits(static_cast<std::uint16_t>(bits));
    const auto value = static_cast<float>(half);
    if (is_nan_half(bits)) {
      ASSERT_TRUE(std::isnan(value)) << bits;
      ASSERT_TRUE(is_nan_half(f16(value).bits)) << bits;  // the payload need not survive
      ASSERT_EQ(f16(value).bits >> 15, bits >> 15);
    } else {
      ASSERT_EQ(static_cast<double>(value), half_value(bits)) << bits;
      ASSERT_EQ(std::signbit(value), bits >= 0x8000U);
      ASSERT_EQ(f16(value).bits, bits);
    }
  }
}

TEST(F16, RoundsAtEveryBoundary) {
  // Between any two neighbouring values: the tie, and the floats next to the tie.
  for (std::uint32_t bits = 0; bits < 0x7c00U; ++bits) {
    const double low = half_value(bits);
    const double high = bits + 1 == 0x7c00U ? 65536.0 : half_value(bits + 1);
    const float tie = static_cast<float>((low + high) / 2);  // exact: twelve significant bits
    for (float value : {tie, std::nextafter(tie, 0.0F), std::nextafter(tie, 1e9F)})
      for (float signed_value : {value, -value})
        ASSERT_NO_FATAL_FAILURE(
            expect_rounds_like_definition(std::bit_cast<std::uint32_t>(signed_value)));
  }
}

TEST(F16, RoundsRandomPatternsLikeTheDefinition) {
  Random random(1);
  for (int i = 0; i < 3'000'000; ++i)
    ASSERT_NO_FATAL_FAILURE(
        expect_rounds_like_definition(static_cast<std::uint32_t>(random.next())));
  // Most random patterns are far outside the range of binary16: exponents from 2^-27 to 2^17.
  for (int i = 0; i < 3'000'000; ++i) {
    const std::uint64_t bits = random.next();
    const auto exponent = static_cast<std::uint32_t>(127 - 27 + (bits >> 32) % 45);
    ASSERT_NO_FATAL_FAILURE(expect_rounds_like_definition(
        (static_cast<std::uint32_t>(bits) & 0x807fffffU) | (exponent << 23)));
  }
}

TEST(F16, Limits) {
  EXPECT_EQ(f16(0.0F).bits, 0x0000);
  EXPECT_EQ(f16(-0.0F).bits, 0x8000);
  EXPECT_EQ(f16(1.0F).bits, 0x3c00);
  EXPECT_EQ(f16(65504.0F).bits, 0x7bff);
  EXPECT_EQ(f16(65519.996F).bits, 0x7bff);
  EXPECT_EQ(f16(65520.0F).bits, 0x7c00);  // a tie, to the even side: infinity
  EXPECT_EQ(f16(0x1p-24F).bits, 0x0001);
  EXPECT_EQ(f16(0x1p-25F).bits, 0x0000);  // a tie, to zero
  EXPECT_EQ(f16(std::nextafter(0x1p-25F, 1.0F)).bits, 0x0001);
  EXPECT_EQ(f16(std::numeric_limits<float>::infinity()).bits, 0x7c00);
  static_assert(f16(1.5F).bits == 0x3e00);  // usable in constant expressions
  static_assert(static_cast<float>(f16::from_bits(0xc000)) == -2.0F);
}

// bfloat16 by integer arithmetic in 64 bits: the upper half, plus one if the lower half is above
// half a unit, or exactly half and the upper half is odd.
std::uint16_t nearest_bf16(std::uint32_t pattern) {
  const std::uint64_t upper = pattern >> 16;
  const std::uint64_t lower = pattern & 0xffffU;
  const bool up = lower > 0x8000U || (lower == 0x8000U && upper % 2 == 1);
  return static_cast<std::uint16_t>(upper + (up ? 1 : 0));
}

void expect_bf16(std::uint32_t pattern) {
  const float value = std::bit_cast<float>(pattern);
  const bf16 converted(value);
  if (std::isnan(value)) {
    ASSERT_TRUE(std::isnan(static_cast<float>(converted))) << std::hex << pattern;
    ASSERT_EQ(converted.bits >> 15, pattern >> 31);
  } else {
    ASSERT_EQ(converted.bits, nearest_bf16(pattern)) << std::hex << pattern;
  }
}

TEST(BF16, EveryPatternIsTheUpperHalfAndComesBack) {
  for (std::uint32_t bits = 0; bits < kAllHalves; ++bits) {
    const auto half = bf16::from_bits(static_cast<std::uint16_t>(bits));
    const auto value = static_cast<float>(half);
    ASSERT_EQ(std::bit_cast<std::uint32_t>(value), bits << 16);
    if (std::isnan(value))
      ASSERT_EQ(bf16(value).bits, bits | 0x40U);  // quiet, the payload stays
    else
      ASSERT_EQ(bf16(value).bits, bits);
  }
}

TEST(BF16, RoundsLikeIntegerArithmetic) {
  for (std::uint32_t upper = 0; upper < kAllHalves; ++upper)
    for (std::uint32_t lower : {0x0000U, 0x0001U, 0x7fffU, 0x8000U, 0x8001U, 0xffffU})
      ASSERT_NO_FATAL_FAILURE(expect_bf16((upper << 16) | lower));
  Random random(2);
  for (int i = 0; i < 3'000'000; ++i)
    ASSERT_NO_FATAL_FAILURE(expect_bf16(static_cast<std::uint32_t>(random.next())));
}

TEST(ElementType, BlocksAndWords) {
  // GGUF's block sizes: scales and mins as float16, quants packed (ggml-common.h).
  EXPECT_EQ(block_shape(ElementType::kQ8_0).bytes, 2 + 32);
  EXPECT_EQ(block_shape(ElementType::kQ4_0).bytes, 2 + 16);
  EXPECT_EQ(block_shape(ElementType::kQ4_1).bytes, 2 + 2 + 16);
  EXPECT_EQ(block_shape(ElementType::kQ4_K).bytes, 2 + 2 + 12 + 128);
  EXPECT_EQ(block_shape(ElementType::kQ6_K).bytes, 128 + 64 + 16 + 2);
  std::set<std::string_view> words;
  for (ElementType type :
       {ElementType::kF32, ElementType::kF16, ElementType::kBF16, ElementType::kQ8_0,
        ElementType::kQ4_0, ElementType::kQ4_1, ElementType::kQ4_K, ElementType::kQ6_K}) {
    EXPECT_NE(to_string(type), "unknown");
    words.insert(to_string(type));
    EXPECT_GE(block_shape(type).values, 1);
  }
  EXPECT_EQ(words.size(), 8U);
  static_assert(element_type_of<float> == ElementType::kF32);
  static_assert(element_type_of<f16> == ElementType::kF16);
  static_assert(element_type_of<bf16> == ElementType::kBF16);
  static_assert(block_shape(ElementType::kBF16).bytes == sizeof(bf16));
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
