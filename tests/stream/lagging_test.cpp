// SPDX-License-Identifier: MIT
#include "sluice/stream/lagging.hpp"
#include "support/test_unit.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace SLUICE_TEST_UNIT {

using sluice::Lagging;
using sluice::lagging;
using sluice::overlap_bound;
using sluice::overlap_efficiency;

using Delays = std::vector<std::int64_t>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kRounding = 1e-12;  // of sums of a few small numbers in double

// What the GPE code's lagging.py gives.
TEST(Lagging, GivesTheReleasedCodesNumbers) {
  struct Case {
    std::int64_t num_source;
    std::int64_t reference_length;
    Delays delays;
    Lagging expected;
  };
  const Case cases[] = {
      {4, 4, {1, 2, 3, 4}, {1, 1}},
      {4, 5, {2, 3, 4, 4, 4}, {2.2, 2.2}},
      {4, 3, {2, 3, 4, 4, 4}, {5.0 / 3, 2.2}},
      {4, 4, {4, 4, 4, 4}, {4, 4}},
      {3, 2, {5, 5}, {5, 5}},
  };
  for (const Case& c : cases) {
    const Lagging measured = lagging(c.delays, c.num_source, c.reference_length);
    EXPECT_NEAR(measured.al, c.expected.al, kRounding);
    EXPECT_NEAR(measured.laal, c.expected.laal, kRounding);
  }
}

TEST(Lagging, OfWaitKIsKWhenLengthsAreEqual) {
  for (std::int64_t k = 1; k <= 9; ++k) {
    Delays delays;
    for (std::int64_t t = 0; t < 20; ++t) delays.push_back(std::min<std::int64_t>(k + t, 20));
    EXPECT_NEAR(lagging(delays, 20, 20).al, static_cast<double>(k), kRounding);
    EXPECT_NEAR(lagging(delays, 20, 20).laal, static_cast<double>(k), kRounding);
  }
}

TEST(Lagging, IgnoresWhatIsWrittenAfterTheSourceIsRead) {
  const Lagging once = lagging(Delays{1, 3, 4}, 4, 9);
  const Lagging longer = lagging(Delays{1, 3, 4, 4, 4, 4}, 4, 9);
  EXPECT_EQ(once.al, longer.al);
  EXPECT_EQ(once.laal, longer.laal);
}

TEST(Lagging, LeavesOutDelaysAboveTheSource) {
  // d = 1, 2 are summed: (1 + 2 - 1) / 2.
  EXPECT_NEAR(lagging(Delays{1, 2, 7}, 4, 4).al, 1, kRounding);
}

TEST(Lagging, OfAnOutputThatReadsNothingIsNegative) {
  // (0 + 0 - 2 + 0 - 4) / 3
  EXPECT_NEAR(lagging(Delays{0, 0, 0}, 4, 2).al, -2, kRounding);
  EXPECT_NEAR(lagging(Delays{0, 0, 0}, 4, 2).laal, -4.0 / 3, kRounding);
}

TEST(Lagging, OfAnEmptySourceIsTheFirstDelay) {
  EXPECT_EQ(lagging(Delays{0, 0}, 0, 2).al, 0);
  EXPECT_EQ(lagging(Delays{0, 0}, 0, 2).laal, 0);
  EXPECT_EQ(lagging(Delays{2, 2}, 0, 2).al, 2);
}

TEST(Lagging, IsNaNWhereItIsNotDefined) {
  EXPECT_TRUE(std::isnan(lagging(Delays{}, 4, 4).al));
  EXPECT_TRUE(std::isnan(lagging(Delays{}, 4, 4).laal));
  EXPECT_TRUE(std::isnan(lagging(Delays{1, 2}, 2, 0).al));
  EXPECT_NEAR(lagging(Delays{1, 2}, 2, 0).laal, 1, kRounding);
}

TEST(OverlapBound, IsAtMostTwo) {
  EXPECT_EQ(overlap_bound(1), 2);
  EXPECT_EQ(overlap_bound(0.5), 1.5);
  EXPECT_NEAR(overlap_bound(3), 4.0 / 3, kRounding);
  EXPECT_EQ(overlap_bound(0), 1);
  EXPECT_EQ(overlap_bound(kInfinity), 1);
  EXPECT_NEAR(overlap_bound(1e-9), 1, 1e-8);
  EXPECT_NEAR(overlap_bound(1e9), 1, 1e-8);
  EXPECT_TRUE(std::isnan(overlap_bound(-0.5)));
  EXPECT_TRUE(std::isnan(overlap_bound(std::nan(""))));
}

TEST(OverlapBound, IsTheSameForSourceAndTargetExchanged) {
  for (const double r : {0.1, 0.5, 0.9, 1.0, 3.0, 40.0})
    EXPECT_NEAR(overlap_bound(r), overlap_bound(1 / r), kRounding);
}

TEST(OverlapEfficiency, IsOneForAPerfectOverlap) {
  for (const double source : {0.5, 2.0, 7.0})
    EXPECT_NEAR(overlap_efficiency(source + 2, std::max(source, 2.0), source, 2), 1, kRounding);
}

TEST(OverlapEfficiency, OfASequentialRunIsOneOverTheBound) {
  EXPECT_NEAR(overlap_efficiency(4, 4, 2, 2), 0.5, kRounding);
  EXPECT_NEAR(overlap_efficiency(4, 4, 3, 1), 0.75, kRounding);
  EXPECT_NEAR(overlap_efficiency(4, 5, 2, 2), 0.4, kRounding);  // overlapping cost time
}

TEST(OverlapEfficiency, DoesNotDependOnTheUnit) {
  EXPECT_NEAR(overlap_efficiency(5, 4, 2, 3), overlap_efficiency(5e3, 4e3, 2e3, 3e3), kRounding);
}

TEST(OverlapEfficiency, WithOneSideEmptyIsTheSpeedUp) {
  EXPECT_EQ(overlap_efficiency(3, 3, 0, 3), 1);
  EXPECT_EQ(overlap_efficiency(3, 4, 3, 0), 0.75);
  EXPECT_EQ(overlap_efficiency(3, 4, 0, 0), 0.75);
}

TEST(OverlapEfficiency, IsNaNWhereNothingWasMeasured) {
  EXPECT_TRUE(std::isnan(overlap_efficiency(0, 1, 1, 1)));
  EXPECT_TRUE(std::isnan(overlap_efficiency(1, 0, 1, 1)));
  EXPECT_TRUE(std::isnan(overlap_efficiency(1, 1, -1, 1)));
  EXPECT_TRUE(std::isnan(overlap_efficiency(1, 1, 1, kInfinity)));
  EXPECT_TRUE(std::isnan(overlap_efficiency(std::nan(""), 1, 1, 1)));
}

}  // namespace SLUICE_TEST_UNIT
