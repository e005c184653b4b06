// SPDX-License-Identifier: MIT
// Every function of the vector layer against scalar arithmetic, lane by lane, at whatever width the
// build has. Conversions are checked over all bit patterns of 16 bits and a sweep of 32.
#include "sluice/backend/cpu/simd.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using simd::kWidth;
using simd::VecF;
using simd::VecI;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Lanes {
  float values[kWidth];

  Lanes() = default;
  explicit Lanes(VecF register_) { simd::store(values, register_); }
  float operator[](int i) const { return values[i]; }
};

struct IntLanes {
  std::int32_t values[kWidth];

  explicit IntLanes(VecI register_) { std::memcpy(values, &register_, sizeof(values)); }
  std::int32_t operator[](int i) const { return values[i]; }
};

Lanes random_lanes(unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Lanes lanes;
  for (float& value : lanes.values) value = normal(random);
  return lanes;
}

bool same_bits(float a, float b) {
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

TEST(Simd, LoadsStoresAndBroadcasts) {
  alignas(64) float memory[2 * kWidth + 1];
  std::iota(memory, memory + 2 * kWidth + 1, 1.0F);
  const Lanes loaded(simd::load(memory + 1));
  for (int i = 0; i < kWidth; ++i) EXPECT_EQ(loaded[i], static_cast<float>(i + 2));
  for (const float value : {3.5F, -0.0F, kInfinity, 1e-40F}) {
    const Lanes lanes(simd::broadcast(value));
    for (int i = 0; i < kWidth; ++i) EXPECT_TRUE(same_bits(lanes[i], value)) << value;
  }
  const Lanes zeros(simd::zero());
  for (int i = 0; i < kWidth; ++i) EXPECT_TRUE(same_bits(zeros[i], 0.0F));
  const IntLanes integers(simd::broadcast(std::int32_t{-7}));
  for (int i = 0; i < kWidth; ++i) EXPECT_EQ(integers[i], -7);
  const Lanes kept(simd::in_register(simd::load(memory)));
  for (int i = 0; i < kWidth; ++i) EXPECT_EQ(kept[i], memory[i]);
}

template <class Element>
void check_partial() {
  for (int count = 0; count <= kWidth; ++count) {
    // Memory of exactly the elements that may be touched.
    std::vector<Element> source(static_cast<std::size_t>(count));
    for (int i = 0; i < count; ++i) source[i] = static_cast<Element>(static_cast<float>(i + 1));
    const VecF loaded = simd::load_partial(source.data(), count);
    const Lanes lanes(loaded);
    for (int i = 0; i < kWidth; ++i)
      EXPECT_EQ(lanes[i], i < count ? static_cast<float>(i + 1) : 0.0F);
    std::vector<Element> target(static_cast<std::size_t>(count));
    simd::store_partial(target.data(), loaded, count);
    for (int i = 0; i < count; ++i)
      EXPECT_EQ(static_cast<float>(target[i]), static_cast<float>(i + 1));
  }
}

TEST(Simd, PartialLoadsAndStoresTouchOnlyTheirElements) {
  check_partial<float>();
  check_partial<f16>();
  check_partial<bf16>();
}

TEST(Simd, Arithmetic) {
  const Lanes a = random_lanes(1);
  const Lanes b = random_lanes(2);
  const Lanes c = random_lanes(3);
  const VecF va = simd::load(a.values);
  const VecF vb = simd::load(b.values);
  const VecF vc = simd::load(c.values);
  const Lanes sum(va + vb), difference(va - vb), product(va * vb), quotient(va / vb);
  const Lanes negative(-va), magnitude(simd::abs(va)), fused(simd::fma(va, vb, vc));
  const Lanes largest(simd::max(va, vb)), smallest(simd::min(va, vb));
  const Lanes selected(simd::select_less(va, vb, vc, -vc));
  VecF compound = va;
  compound += vb;
  compound -= vc;
  compound *= vb;
  const Lanes compounded(compound);
  for (int i = 0; i < kWidth; ++i) {
    EXPECT_EQ(sum[i], a[i] + b[i]);
    EXPECT_EQ(difference[i], a[i] - b[i]);
    EXPECT_EQ(product[i], a[i] * b[i]);
    EXPECT_EQ(quotient[i], a[i] / b[i]);
    EXPECT_EQ(negative[i], -a[i]);
    EXPECT_EQ(magnitude[i], std::fabs(a[i]));
    // Rounded once or twice: within a rounding of the product and one of the sum.
    const double exact =
        static_cast<double>(a[i]) * static_cast<double>(b[i]) + static_cast<double>(c[i]);
    EXPECT_NEAR(fused[i], exact, 0x1p-24 * (std::fabs(a[i] * b[i]) + std::fabs(exact)));
    EXPECT_EQ(largest[i], a[i] > b[i] ? a[i] : b[i]);
    EXPECT_EQ(smallest[i], a[i] < b[i] ? a[i] : b[i]);
    EXPECT_EQ(selected[i], a[i] < b[i] ? c[i] : -c[i]);
    EXPECT_NEAR(compounded[i], (a[i] + b[i] - c[i]) * b[i], 1e-6F);
  }
}

TEST(Simd, NanRulesOfMaxMinAndSelect) {
  const VecF nan = simd::broadcast(kNan);
  const VecF one = simd::broadcast(1.0F);
  EXPECT_EQ(Lanes(simd::max(nan, one))[0], 1.0F);
  EXPECT_TRUE(std::isnan(Lanes(simd::max(one, nan))[0]));
  EXPECT_EQ(Lanes(simd::min(nan, one))[0], 1.0F);
  EXPECT_TRUE(std::isnan(Lanes(simd::min(one, nan))[0]));
  EXPECT_EQ(Lanes(simd::select_less(nan, one, nan, one))[0], 1.0F);
}

TEST(Simd, IntegerOperations) {
  std::int32_t memory[kWidth];
  std::mt19937 random(4);
  for (std::int32_t& value : memory) value = static_cast<std::int32_t>(random());
  const VecI a = simd::load_int32(memory);
  const VecI b = simd::broadcast(std::int32_t{0x0ff0f00f});
  std::int32_t counts[kWidth];
  for (int i = 0; i < kWidth; ++i) counts[i] = i;
  const IntLanes conjunction(a & b), disjunction(a | b), sum(a + b), left(a << 5), right(a >> 28);
  const IntLanes varied(simd::shift_right(a, simd::load_int32(counts)));
  const Lanes converted(simd::to_float(a));
  const IntLanes round_trip(simd::bits_as_int(simd::bits_as_float(a)));
  for (int i = 0; i < kWidth; ++i) {
    const auto bits = static_cast<std::uint32_t>(memory[i]);
    EXPECT_EQ(conjunction[i], memory[i] & 0x0ff0f00f);
    EXPECT_EQ(disjunction[i], memory[i] | 0x0ff0f00f);
    EXPECT_EQ(sum[i], static_cast<std::int32_t>(bits + 0x0ff0f00fU));
    EXPECT_EQ(left[i], static_cast<std::int32_t>(bits << 5));
    EXPECT_EQ(right[i], static_cast<std::int32_t>(bits >> 28)) << "the shift is logical";
    EXPECT_EQ(varied[i], static_cast<std::int32_t>(bits >> i));
    EXPECT_EQ(converted[i], static_cast<float>(memory[i]));
    EXPECT_EQ(round_trip[i], memory[i]);
  }
}

TEST(Simd, Reductions) {
  VecF registers[4];
  for (unsigned seed = 0; seed < 4; ++seed) {
    const Lanes a = random_lanes(10 + seed);
    registers[seed] = simd::load(a.values);
    double sum = 0.0;
    float largest = a[0];
    for (int i = 0; i < kWidth; ++i) {
      sum += static_cast<double>(a[i]);
      largest = std::max(largest, a[i]);
    }
    // At most four additions deep over terms of at most a few units.
    EXPECT_NEAR(simd::reduce_add(registers[seed]), sum, 4 * kWidth * 0x1p-24);
    EXPECT_EQ(simd::reduce_max(registers[seed]), largest);
  }
  float sums[4];
  simd::reduce_add(registers, sums);
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(same_bits(sums[i], simd::reduce_add(registers[i])));
  simd::add_lanes(registers, sums);
  for (int i = 0; i < 4; ++i) {
    EXPECT_NEAR(sums[i], simd::reduce_add(registers[i]), 8 * kWidth * 0x1p-24);
    // The order is the same in every place.
    const simd::VecF same[4] = {registers[i], registers[i], registers[i], registers[i]};
    float again[4];
    simd::add_lanes(same, again);
    EXPECT_TRUE(same_bits(again[3 - i], sums[i]));
  }
  float lane[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    std::fill(lane, lane + kWidth, -kInfinity);
    lane[i] = -3.0F;
    EXPECT_EQ(simd::reduce_max(simd::load(lane)), -3.0F) << "in lane " << i;
  }
}

TEST(Simd, Bf16AndF16LoadsAreExactForAllPatterns) {
  for (int first = 0; first < 65536; first += kWidth) {
    f16 halves[kWidth];
    bf16 brains[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      halves[i] = f16::from_bits(static_cast<std::uint16_t>(first + i));
      brains[i] = bf16::from_bits(static_cast<std::uint16_t>(first + i));
    }
    const Lanes from_halves(simd::load(halves));
    const Lanes from_brains(simd::load(brains));
    for (int i = 0; i < kWidth; ++i) {
      const auto half = static_cast<float>(halves[i]);
      const bool agrees =
          std::isnan(half)
              ? std::isnan(from_halves[i]) && std::isnan(simd::to_float(halves[i]))
              : same_bits(from_halves[i], half) && same_bits(simd::to_float(halves[i]), half);
      ASSERT_TRUE(agrees) << "f16 " << first + i;
      ASSERT_TRUE(same_bits(from_brains[i], static_cast<float>(brains[i]))) << "bf16 " << first + i;
    }
    const Lanes repeated(simd::broadcast_half(halves));
    if (!std::isnan(static_cast<float>(halves[0]))) {
      ASSERT_TRUE(same_bits(repeated[kWidth - 1], static_cast<float>(halves[0])));
    }
  }
}

TEST(Simd, Bf16AndF16StoresRoundAsTheElementTypesDo) {
  // A prime step through all patterns, and the neighbourhood of every f16 and bf16 boundary.
  std::vector<std::uint32_t> patterns;
  for (std::uint64_t bits = 0; bits < (std::uint64_t{1} << 32); bits += 9973)
    patterns.push_back(static_cast<std::uint32_t>(bits));
  for (std::uint32_t high = 0; high < 65536; high += 7)
    for (const std::uint32_t low : {0x0000U, 0x0001U, 0x1000U, 0x1001U, 0x7fffU, 0x8000U, 0x8001U})
      patterns.push_back((high << 16) | low);
  patterns.resize(patterns.size() / kWidth * kWidth);
  for (std::size_t first = 0; first < patterns.size(); first += kWidth) {
    float values[kWidth];
    for (int i = 0; i < kWidth; ++i) values[i] = std::bit_cast<float>(patterns[first + i]);
    f16 halves[kWidth];
    bf16 brains[kWidth];
    simd::store(halves, simd::load(values));
    simd::store(brains, simd::load(values));
    for (int i = 0; i < kWidth; ++i) {
      ASSERT_EQ(halves[i].bits, f16(values[i]).bits) << "f16 of " << patterns[first + i];
      ASSERT_EQ(brains[i].bits, bf16(values[i]).bits) << "bf16 of " << patterns[first + i];
    }
  }
}

TEST(Simd, ByteAndNibbleLoads) {
  for (int first = 0; first < 256; first += kWidth) {
    std::uint8_t bytes[kWidth];
    std::int8_t levels[kWidth];
    for (int i = 0; i < kWidth; ++i) bytes[i] = static_cast<std::uint8_t>(first + i);
    std::memcpy(levels, bytes, sizeof(bytes));
    const Lanes from_bytes(simd::load(bytes)), from_levels(simd::load(levels));
    const Lanes low(simd::load_low_nibbles(bytes)), high(simd::load_high_nibbles(bytes));
    const IntLanes integers(simd::load_uint8(bytes));
    for (int i = 0; i < kWidth; ++i) {
      EXPECT_EQ(from_bytes[i], static_cast<float>(bytes[i]));
      EXPECT_EQ(from_levels[i], static_cast<float>(levels[i]));
      EXPECT_EQ(low[i], static_cast<float>(bytes[i] & 15));
      EXPECT_EQ(high[i], static_cast<float>(bytes[i] >> 4));
      EXPECT_EQ(integers[i], bytes[i]);
    }
  }
}

TEST(Simd, ArrangementsOfBlockFields) {
  const Lanes halves(simd::broadcast_halves(2.0F, 5.0F));
  for (int i = 0; i < kWidth; ++i) EXPECT_EQ(halves[i], 2 * i < kWidth ? 2.0F : 5.0F);
  const std::uint32_t words[4] = {0x04030201, 0x08070605, 0x0c0b0aff, 0x100f0e0d};
  float scaled[16];
  simd::store_bytes_scaled(words, 3.0F, -2.0F, scaled);
  for (int i = 0; i < 16; ++i) {
    const float byte = i == 8 ? 255.0F : static_cast<float>(i + 1);
    EXPECT_EQ(scaled[i], (i < 8 ? 3.0F : -2.0F) * byte);
  }
  if constexpr (kWidth >= 4) {
    const float few[4] = {1.0F, 2.0F, 3.0F, 4.0F};
    const Lanes repeated(simd::repeat_by_four(few));
    for (int i = 0; i < kWidth; ++i) EXPECT_EQ(repeated[i], few[i / 4]);
  }
  if constexpr (kWidth == 16) {
    std::int32_t eight[8];
    std::iota(eight, eight + 8, 10);
    const IntLanes twice(simd::load_int32_twice(eight));
    for (int i = 0; i < kWidth; ++i) EXPECT_EQ(twice[i], eight[i % 8]);
  }
}

template <int kStride, int kChunk, int kHalf>
void check_records() {
  if constexpr (kWidth >= 4) {
    for (int count = 1; count <= kWidth / 4; ++count) {
      // Memory of exactly the records that may be read.
      std::vector<unsigned char> bytes(static_cast<std::size_t>(count) * kStride);
      for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<unsigned char>(i + 1);
      for (int r = 0; r < count; ++r) {
        const f16 half(1.5F + static_cast<float>(r));
        std::memcpy(bytes.data() + r * kStride + kHalf, &half, sizeof(half));
      }
      const simd::Records<kStride> records(bytes.data(), count);
      const VecI chunks = records.template chunks<kChunk>();
      unsigned char lanes[4 * kWidth];
      std::memcpy(lanes, &chunks, sizeof(lanes));
      for (int i = 0; i < 4 * kWidth; ++i)
        EXPECT_EQ(lanes[i], i / 16 < count ? bytes[i / 16 * kStride + kChunk + i % 16] : 0)
            << "byte " << i << " of " << count << " records";
      const Lanes halves(records.template halves<kHalf>());
      for (int i = 0; i < kWidth; ++i)
        EXPECT_EQ(halves[i], i / 4 < count ? 1.5F + static_cast<float>(i / 4) : 0.0F);
    }
  }
}

TEST(Simd, RecordsAreReadWholeOrInPart) {
  check_records<18, 2, 0>();
  check_records<20, 4, 0>();
  check_records<20, 4, 2>();
}

TEST(Simd, Transpose) {
  VecF rows[kWidth];
  for (int r = 0; r < kWidth; ++r) {
    float lanes[kWidth];
    for (int c = 0; c < kWidth; ++c) lanes[c] = static_cast<float>(r * kWidth + c);
    rows[r] = simd::load(lanes);
  }
  simd::transpose(rows);
  for (int r = 0; r < kWidth; ++r) {
    const Lanes lanes(rows[r]);
    for (int c = 0; c < kWidth; ++c) EXPECT_EQ(lanes[c], static_cast<float>(c * kWidth + r));
  }
}

// At most 2 ulp against std::exp in double (measured: 1.01), over every 64th float of [-87, 88].
TEST(Simd, ExpIsWithinTwoUlp) {
  double worst = 0.0;
  const auto sweep = [&worst](float from, float to) {
    auto bits = std::bit_cast<std::uint32_t>(from);
    const auto last = std::bit_cast<std::uint32_t>(to);
    while (bits <= last) {
      float values[kWidth];
      for (float& value : values) {
        value = std::bit_cast<float>(bits <= last ? bits : last);
        bits += 64;
      }
      const Lanes result(simd::exp(simd::load(values)));
      for (int i = 0; i < kWidth; ++i) {
        const double exact = std::exp(static_cast<double>(values[i]));
        const auto rounded = static_cast<float>(exact);
        const double ulp =
            static_cast<double>(std::nextafter(rounded, kInfinity)) - static_cast<double>(rounded);
        worst = std::max(worst, std::fabs(static_cast<double>(result[i]) - exact) / ulp);
      }
    }
  };
  sweep(1e-8F, 88.0F);
  sweep(-1e-8F, -87.0F);
  EXPECT_LE(worst, 2.0);
}

TEST(Simd, ExpAtItsEnds) {
  const auto exp = [](float value) {
    return Lanes(simd::exp(simd::broadcast(value)))[kWidth - 1];
  };
  EXPECT_EQ(exp(0.0F), 1.0F);
  EXPECT_EQ(exp(-0.0F), 1.0F);
  EXPECT_EQ(exp(-kInfinity), 0.0F);
  EXPECT_EQ(exp(-104.0F), 0.0F);
  EXPECT_EQ(exp(-1e30F), 0.0F);
  EXPECT_EQ(exp(kInfinity), kInfinity);
  EXPECT_EQ(exp(89.0F), kInfinity);
  EXPECT_EQ(exp(1e30F), kInfinity);
  EXPECT_TRUE(std::isnan(exp(kNan)));
  EXPECT_TRUE(std::isfinite(exp(88.7F)));
  // Subnormal results.
  for (float value = -103.9F; value < -87.4F; value += 0.1F)
    EXPECT_NEAR(exp(value), std::exp(static_cast<double>(value)), 1.5 * 0x1p-149) << value;
}

TEST(Simd, PrefetchTakesAnyAddress) {
  simd::prefetch(nullptr);
  simd::prefetch_far(reinterpret_cast<const void*>(std::uintptr_t{1}));
}

TEST(Simd, DotsOfBytesAreExact) {
  std::mt19937 random(21);
  const auto byte = [](std::int32_t word, int i) {
    return (static_cast<std::uint32_t>(word) >> (8 * i)) & 255U;
  };
  const auto signed_byte = [&](std::int32_t word, int i) {
    return static_cast<std::int32_t>(static_cast<std::int8_t>(byte(word, i)));
  };
  for (int round = 0; round < 200; ++round) {
    std::int32_t sums[kWidth], levels[kWidth], numbers[kWidth], biased[kWidth], values[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) {
      sums[lane] = static_cast<std::int32_t>(random() % 2000000) - 1000000;
      std::uint32_t level_word = 0, number_word = 0, biased_word = 0, value_word = 0;
      for (int i = 0; i < 4; ++i) {
        // The first rounds have all extremes, whose pairs overflow 16 bits where they may not.
        const std::uint32_t level = round < 8 ? 127U : random() % 128U;
        const std::uint32_t number = round < 4 ? 0x80U : round < 8 ? 0x7fU : random() % 256U;
        const std::int32_t value = round % 2 == 0 && round < 8 ? -127
                                   : round < 8                 ? 127
                                               : static_cast<int>(random() % 255) - 127;
        level_word |= level << (8 * i);
        number_word |= number << (8 * i);
        biased_word |= ((number + simd::kSignedBias) & 255U) << (8 * i);
        value_word |= (static_cast<std::uint32_t>(value) & 255U) << (8 * i);
      }
      levels[lane] = static_cast<std::int32_t>(level_word);
      numbers[lane] = static_cast<std::int32_t>(number_word);
      biased[lane] = static_cast<std::int32_t>(biased_word);
      values[lane] = static_cast<std::int32_t>(value_word);
    }
    const IntLanes unsigned_dot(simd::dot_levels(simd::load_int32(sums), simd::load_int32(levels),
                                                 simd::load_int32(values)));
    const IntLanes signed_dot(simd::dot_signed(simd::load_int32(sums), simd::load_int32(biased),
                                               simd::load_int32(values)));
    for (int lane = 0; lane < kWidth; ++lane) {
      std::int32_t of_levels = sums[lane];
      std::int32_t of_numbers = sums[lane];
      for (int i = 0; i < 4; ++i) {
        const std::int32_t value = signed_byte(values[lane], i);
        of_levels += static_cast<std::int32_t>(byte(levels[lane], i)) * value;
        of_numbers += (signed_byte(numbers[lane], i) + simd::kSignedBias) * value;
      }
      ASSERT_EQ(unsigned_dot[lane], of_levels);
      ASSERT_EQ(signed_dot[lane], of_numbers);
    }
  }
}

TEST(Simd, PairsAreRoundedAndMultiplied) {
  std::mt19937 random(23);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 50; ++round) {
    float values[2 * kWidth];
    for (float& value : values) value = normal(random);
    if (round == 0) values[1] = kInfinity;
    const simd::VecI rounded = simd::round_pairs(simd::load(values), simd::load(values + kWidth));
    bf16 pairs[2 * kWidth];
    std::memcpy(pairs, &rounded, sizeof(pairs));
    for (int i = 0; i < 2 * kWidth; ++i) EXPECT_EQ(pairs[i].bits, bf16(values[i]).bits);

    // Small whole numbers, of which float32 sums are exact.
    bf16 a[2 * kWidth], b[2 * kWidth];
    float sums[kWidth];
    for (int i = 0; i < 2 * kWidth; ++i) {
      a[i] = bf16(static_cast<float>(static_cast<int>(random() % 255) - 127));
      b[i] = bf16(static_cast<float>(static_cast<int>(random() % 255) - 127));
      sums[i / 2] = static_cast<float>(static_cast<int>(random() % 2001) - 1000);
    }
    const Lanes dots(simd::dot_pairs(simd::load(sums), simd::load_int32(a), simd::load_int32(b)));
    for (int i = 0; i < kWidth; ++i)
      EXPECT_EQ(dots[i], sums[i] + static_cast<float>(a[2 * i]) * static_cast<float>(b[2 * i]) +
                             static_cast<float>(a[2 * i + 1]) * static_cast<float>(b[2 * i + 1]));
  }
}

TEST(Simd, QuadsOfRows) {
  if constexpr (kWidth >= 4) {
    constexpr int kStride = 37;  // no alignment
    std::mt19937 random(24);
    std::uint8_t bytes[(kWidth / 4 - 1) * kStride + 64];
    for (std::uint8_t& each : bytes) each = static_cast<std::uint8_t>(random());
    const simd::VecI quads = simd::load_quads(bytes, kStride);
    const simd::VecI repeated = simd::repeat_quad(bytes);
    for (int g = 0; g < kWidth / 4; ++g) {
      EXPECT_EQ(
          std::memcmp(reinterpret_cast<const char*>(&quads) + 16 * g, bytes + g * kStride, 16), 0);
      EXPECT_EQ(std::memcmp(reinterpret_cast<const char*>(&repeated) + 16 * g, bytes, 16), 0);
    }
    simd::VecI four[4];
    simd::load_quads(bytes, kStride, four);
    for (int i = 0; i < 4; ++i)
      for (int g = 0; g < kWidth / 4; ++g)
        EXPECT_EQ(std::memcmp(reinterpret_cast<const char*>(&four[i]) + 16 * g,
                              bytes + g * kStride + 16 * i, 16),
                  0);
  }
}

TEST(Simd, QuadsToRows) {
  constexpr int kGroups = std::max(1, kWidth / 4);
  constexpr int kLanes = kWidth / kGroups;  // of a group
  constexpr int kStride = 7;
  float lanes[kWidth];
  for (int i = 0; i < kWidth; ++i) lanes[i] = static_cast<float>(i + 1);
  std::array<float, kGroups * kStride> rows{};
  simd::store_quads(rows.data(), kStride, simd::load(lanes));
  for (int g = 0; g < kGroups; ++g)
    for (int i = 0; i < kStride; ++i) {
      const float expected = i < kLanes ? lanes[g * kLanes + i] : 0.0F;
      EXPECT_EQ(rows[static_cast<std::size_t>(g * kStride + i)], expected);
    }
}

TEST(Simd, LowBytesAndIntegerMaxima) {
  std::mt19937 random(22);
  std::int32_t a[kWidth], b[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    a[i] = static_cast<std::int32_t>(random());
    b[i] = static_cast<std::int32_t>(random());
  }
  const IntLanes largest(simd::max(simd::load_int32(a), simd::load_int32(b)));
  std::int8_t bytes[kWidth + 1];
  bytes[kWidth] = 77;
  simd::store_low_bytes(bytes, simd::load_int32(a));
  for (int i = 0; i < kWidth; ++i) {
    EXPECT_EQ(largest[i], std::max(a[i], b[i]));
    EXPECT_EQ(bytes[i], static_cast<std::int8_t>(static_cast<std::uint32_t>(a[i]) & 255U));
  }
  EXPECT_EQ(bytes[kWidth], 77);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
