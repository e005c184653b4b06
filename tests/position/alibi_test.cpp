// SPDX-License-Identifier: MIT
#include "sluice/position/alibi.hpp"

#include <gtest/gtest.h>

#include <vector>

#include "sluice/core/error.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using sluice::alibi_bias;
using sluice::alibi_slopes;

TEST(AlibiSlopes, PowersOfTwoAreOneGeometricSequence) {
  EXPECT_EQ(alibi_slopes(8), (std::vector<float>{0.5F, 0.25F, 0.125F, 0.0625F, 0.03125F, 0.015625F,
                                                 0.0078125F, 0.00390625F}));
  EXPECT_EQ(alibi_slopes(2), (std::vector<float>{0.0625F, 0.00390625F}));
  EXPECT_EQ(alibi_slopes(1), (std::vector<float>{0.00390625F}));
}

TEST(AlibiSlopes, OtherCountsContinueWithEverySecondSlopeOfTheDouble) {
  EXPECT_EQ(alibi_slopes(6),
            (std::vector<float>{0.25F, 0.0625F, 0.015625F, 0.00390625F, 0.5F, 0.125F}));
  EXPECT_EQ(alibi_slopes(3), (std::vector<float>{0.0625F, 0.00390625F, 0.25F}));
}

TEST(AlibiSlopes, LargeCountsStayPositiveAndFollowTheRuleOfTheirHalves) {
  const std::vector<float> slopes = alibi_slopes(71);  // Falcon-7B's number of heads
  const std::vector<float> lower = alibi_slopes(64);
  const std::vector<float> doubled = alibi_slopes(128);
  ASSERT_EQ(slopes.size(), 71U);
  for (std::size_t head = 0; head < 64; ++head) EXPECT_EQ(slopes[head], lower[head]);
  for (std::size_t head = 64; head < 71; ++head) EXPECT_EQ(slopes[head], doubled[2 * (head - 64)]);
  for (const float slope : slopes) EXPECT_GT(slope, 0.0F);
}

TEST(AlibiSlopes, RefusesNoHeads) {
  for (const int num_heads : {0, -4}) {
    try {
      alibi_slopes(num_heads);
      FAIL() << "accepted " << num_heads;
    } catch (const sluice::Error& error) {
      EXPECT_EQ(error.code(), sluice::ErrorCode::kConfig);
      EXPECT_EQ(error.detail().field, "num_heads");
      EXPECT_EQ(error.detail().found, std::to_string(num_heads));
    }
  }
}

// A cache of tokens 0, 2, 3 read by token 4, slope 0.5.
TEST(AlibiBias, DependsOnTheRule) {
  const std::vector<double> in_cache{0, 1, 2, 3};
  const std::vector<double> in_text{0, 2, 3, 4};
  const std::vector<float> cache_biases{-1.5F, -1.0F, -0.5F, 0.0F};
  const std::vector<float> text_biases{-2.0F, -1.0F, -0.5F, 0.0F};
  for (std::size_t key = 0; key < 4; ++key) {
    EXPECT_EQ(alibi_bias(0.5F, in_cache[key], in_cache.back()), cache_biases[key]);
    EXPECT_EQ(alibi_bias(0.5F, in_text[key], in_text.back()), text_biases[key]);
  }
}

TEST(AlibiBias, IsExactLateInAStream) {
  EXPECT_EQ(alibi_bias(0.25F, 1e8 - 7, 1e8), -1.75F);
  EXPECT_EQ(alibi_bias(0.25F, 1e12 + 0.5, 1e12 + 1), -0.125F);
}

}  // namespace SLUICE_TEST_UNIT
