// SPDX-License-Identifier: MIT
#include "sluice/core/random.hpp"

#include <cmath>
#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

// From a separate implementation of splitmix64 and xoshiro256** on unbounded integers, itself
// checked against their authors' published values.
TEST(Random, KnownSequences) {
  struct Known {
    std::uint64_t seed;
    Random::State state;
    Random::State first;
    std::uint64_t ten_thousandth;
  };
  for (const Known& known :
       {Known{0,
              {0xe220a8397b1dcdaf, 0x6e789e6aa1b965f4, 0x06c45d188009454f, 0xf88bb8a8724c81ec},
              {0x99ec5f36cb75f2b4, 0xbf6e1f784956452a, 0x1a5f849d4933e6e0, 0x6aa594f1262d2d2c},
              0x7e42e7ea9c94ebf3},
        Known{1,
              {0x910a2dec89025cc1, 0xbeeb8da1658eec67, 0xf893a2eefb32555e, 0x71c18690ee42c90b},
              {0xb3f2af6d0fc710c5, 0x853b559647364cea, 0x92f89756082a4514, 0x642e1c7bc266a3a7},
              0x514707b3ed7f8777},
        Known{42,
              {0xbdd732262feb6e95, 0x28efe333b266f103, 0x47526757130f9f52, 0x581ce1ff0e4ae394},
              {0x15780b2e0c2ec716, 0x6104d9866d113a7e, 0xae17533239e499a1, 0xecb8ad4703b360a1},
              0xeed6344df08981a9},
        Known{0xffffffffffffffff,
              {0xe4d971771b652c20, 0xe99ff867dbf682c9, 0x382ff84cb27281e9, 0x6d1db36ccba982d2},
              {0x8f5520d52a7ead08, 0xc476a018caa1802d, 0x81de31c0d260469e, 0xbf658d7e065f3c2f},
              0xd9a54629b3ebb532}}) {
    Random random(known.seed);
    EXPECT_EQ(random.state(), known.state);
    for (std::uint64_t value : known.first) EXPECT_EQ(random.next(), value);
    for (int i = 4; i < 9999; ++i) random.next();
    EXPECT_EQ(random.next(), known.ten_thousandth);
  }
}

// The authors' own check of xoshiro256**, from the state 1, 2, 3, 4.
TEST(Random, PublishedSequenceFromAPlainState) {
  Random random(0);
  random.set_state({1, 2, 3, 4});
  for (std::uint64_t value : {11520ULL, 0ULL, 1509978240ULL, 1215971899390074240ULL,
                              1216172134540287360ULL, 607988272756665600ULL})
    EXPECT_EQ(random.next(), value);
}

TEST(Random, StateContinuesTheSequence) {
  Random random(9);
  for (int i = 0; i < 100; ++i) random.next();
  Random copy(0);
  copy.set_state(random.state());
  for (int i = 0; i < 100; ++i) ASSERT_EQ(copy.next(), random.next());
}

// Bounds below are five standard deviations of the estimate, with fixed seeds.
TEST(Random, UniformIsUniform) {
  constexpr int kDraws = 400'000;
  constexpr int kBins = 64;
  Random random(10);
  std::vector<int> bins(kBins);
  for (int i = 0; i < kDraws; ++i) {
    const double u = random.uniform();
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    ++bins[static_cast<std::size_t>(u * kBins)];
  }
  double statistic = 0;
  for (int count : bins) statistic += std::pow(count - kDraws / kBins, 2) / (kDraws / kBins);
  EXPECT_LT(std::abs(statistic - (kBins - 1)), 5 * std::sqrt(2.0 * (kBins - 1)));
}

TEST(Random, UniformHas53Bits) {
  Random random(11);
  Random same(11);
  for (int i = 0; i < 1000; ++i)
    ASSERT_EQ(random.uniform(), std::ldexp(static_cast<double>(same.next() / 2048), -53));
}

TEST(Random, NormalHasTheNormalsMoments) {
  constexpr int kDraws = 400'000;
  Random random(12);
  double sum = 0;
  double squares = 0;
  double fourth = 0;
  int beyond_two = 0;
  for (int i = 0; i < kDraws; ++i) {
    const double x = random.normal();
    ASSERT_TRUE(std::isfinite(x));
    sum += x;
    squares += x * x;
    fourth += x * x * x * x;
    beyond_two += std::abs(x) > 2.0 ? 1 : 0;
  }
  const double root = std::sqrt(static_cast<double>(kDraws));
  EXPECT_NEAR(sum / kDraws, 0.0, 5 / root);
  EXPECT_NEAR(squares / kDraws, 1.0, 5 * std::sqrt(2.0) / root);
  EXPECT_NEAR(fourth / kDraws, 3.0, 5 * std::sqrt(96.0) / root);
  const double p = std::erfc(2.0 / std::sqrt(2.0));
  EXPECT_NEAR(static_cast<double>(beyond_two) / kDraws, p, 5 * std::sqrt(p * (1 - p)) / root);
}

TEST(Random, BelowStaysBelow) {
  Random random(13);
  for (std::uint64_t bound : {std::uint64_t{1}, std::uint64_t{2}, std::uint64_t{3},
                              std::uint64_t{1000}, (std::uint64_t{1} << 53) + 1, ~std::uint64_t{0}})
    for (int i = 0; i < 20'000; ++i) ASSERT_LT(random.below(bound), bound);
  std::vector<int> counts(5);
  for (int i = 0; i < 100'000; ++i) ++counts[random.below(5)];
  for (int count : counts) EXPECT_NEAR(count, 20'000, 5 * std::sqrt(16'000.0));
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
