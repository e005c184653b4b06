// SPDX-License-Identifier: MIT
#include "sluice/position/position.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <type_traits>

#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using sluice::Position;
using sluice::Position3;
using sluice::PositionRule;

TEST(Position, IsRealAndCountsEveryTokenOfALongStream) {
  static_assert(std::is_floating_point_v<Position>);
  static_assert(std::numeric_limits<Position>::digits >= 53);
  const Position late = 1e15;
  EXPECT_EQ(late + 1 - late, 1);
  EXPECT_EQ(late + 0.5 - late, 0.5);
}

TEST(Position, TextHasOneValueOnAllAxes) {
  EXPECT_EQ(sluice::on_all_axes(5.5), (Position3{5.5, 5.5, 5.5}));
  EXPECT_NE(sluice::on_all_axes(5.5), (Position3{5.5, 5.5, 6.5}));
  EXPECT_EQ(Position3{}, sluice::on_all_axes(0));
}

TEST(PositionRule, HasTheNamesOfTheOptions) {
  EXPECT_EQ(to_string(PositionRule::kInCache), "in-cache");
  EXPECT_EQ(to_string(PositionRule::kInText), "in-text");
}

}  // namespace SLUICE_TEST_UNIT
