// SPDX-License-Identifier: MIT
#include "sluice/attention/query_directions.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"
#include "sluice/position/rotary.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;

// cache-and-kernel-algorithms.md, test B.2: three of four queries point along [1, 0].
TEST(QueryDirections, TypedInOrientation) {
  const std::vector<float> queries{1, .1F, 1, -.1F, .9F, 0, -.1F, .05F};
  for (const float sign : {1.0F, -1.0F}) {
    std::vector<float> turned = queries;
    for (float& x : turned) x *= sign;
    QueryDirections directions(1, 1, 1, 2, 16);
    directions.observe(0, {HeadsView<const float>(turned.data(), 4, 1, 2)}, nullptr);
    const std::vector<float> filters = directions.filters();
    EXPECT_NEAR(filters[0], -1 * sign, 2e-5);
    EXPECT_NEAR(filters[1], .0018F * sign, 5e-5);
  }
}

/// Samples round a planted direction, more of them than are kept: rotated, and averaged over a
/// group.
TEST(QueryDirections, FindsAPlantedDirection) {
  constexpr std::int64_t kDim = 8;
  const Rotary rotary({.head_dim = kDim, .rotary_dim = kDim, .theta = 100});
  Random random(3);
  std::vector<std::vector<double>> planted(2, std::vector<double>(kDim));
  for (auto& direction : planted) {
    double norm = 0;
    for (double& x : direction) {
      x = random.normal();
      norm += x * x;
    }
    for (double& x : direction) x /= std::sqrt(norm);
  }
  QueryDirections directions(1, 2, 1, kDim, 500);
  for (std::int64_t t = 0; t < 2000; ++t) {
    // Turned back by the token's rotation, so that the rotated query is the planted one.
    std::vector<float> row(2 * kDim);
    std::vector<float> angles(static_cast<std::size_t>(rotary.row_size()));
    rotary.angles(-static_cast<double>(t), angles.data());
    for (std::size_t head = 0; head < 2; ++head) {
      std::vector<float> q(kDim);
      for (std::size_t d = 0; d < kDim; ++d)
        q[d] =
            static_cast<float>((1 + random.uniform()) * planted[head][d] + 0.05 * random.normal());
      rotary.rotate(angles.data(), q.data(), row.data() + head * kDim);
    }
    directions.observe(
        0, {HeadsView<const float>(row.data(), 1, 2, kDim), t, static_cast<double>(t)}, &rotary);
  }
  const std::vector<float> filter = directions.filters();
  for (std::size_t d = 0; d < kDim; ++d)
    EXPECT_NEAR(filter[d], -(planted[0][d] + planted[1][d]) / 2, 0.01) << d;
}

TEST(QueryDirections, WhatDoesNotFit) {
  EXPECT_THROW(QueryDirections(1, 3, 2, 8), Error);
  EXPECT_THROW(QueryDirections(0, 2, 2, 8), Error);
  EXPECT_THROW(QueryDirections(1, 2, 2, 8, 0), Error);
  EXPECT_THROW(QueryDirections(1, 2, 2, 8).filters(), Error);
}

}  // namespace SLUICE_TEST_UNIT
