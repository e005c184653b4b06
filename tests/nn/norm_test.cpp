// SPDX-License-Identifier: MIT
#include "sluice/nn/norm.hpp"

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

std::vector<float> random_values(std::int64_t count, unsigned seed, double scale = 1.0) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0.0, scale);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = static_cast<float>(normal(random));
  return values;
}

// The definition in float64.
double expected(const float* row, std::int64_t cols, std::int64_t c, double weight, double eps) {
  double squares = 0.0;
  for (std::int64_t i = 0; i < cols; ++i)
    squares += static_cast<double>(row[i]) * static_cast<double>(row[i]);
  return static_cast<double>(row[c]) / std::sqrt(squares / static_cast<double>(cols) + eps) *
         weight;
}

// Rounded: the scale (its mean to about a unit more), the weight with one added, two products.
constexpr double kTolerance = 4 * 0x1p-24;

TEST(RmsNorm, MatchesTheDefinitionInFloat64) {
  for (const std::int64_t cols : {1, 2, 7, 16, 31, 64, 127, 576, 1000, 4096}) {
    for (const bool add_one : {false, true}) {
      for (const double scale : {1e-3, 1.0, 1e4}) {
        const std::vector<float> x = random_values(3 * cols, 1, scale);
        const std::vector<float> weight = random_values(cols, 2);
        std::vector<float> y(x.size());
        rms_norm({x.data(), 3, cols}, weight.data(), 1e-5F, {y.data(), 3, cols}, add_one);
        for (std::int64_t t = 0; t < 3; ++t) {
          for (std::int64_t c = 0; c < cols; ++c) {
            const double factor = static_cast<double>(weight[c]) + (add_one ? 1.0 : 0.0);
            const double exact =
                expected(x.data() + t * cols, cols, c, factor, static_cast<double>(1e-5F));
            ASSERT_NEAR(y[t * cols + c], exact, kTolerance * std::fabs(exact))
                << cols << " columns, column " << c;
          }
        }
      }
    }
  }
}

TEST(RmsNorm, WorksInPlaceAndKeepsToItsViews) {
  const std::int64_t cols = 37;
  const std::int64_t stride = 40;
  std::vector<float> x = random_values(4 * stride, 3);
  const std::vector<float> before = x;
  const std::vector<float> weight = random_values(cols, 4);
  const MatrixView<float> view{x.data(), 4, cols, stride};
  rms_norm(view, weight.data(), 1e-6F, view);
  for (std::int64_t t = 0; t < 4; ++t) {
    for (std::int64_t c = 0; c < stride; ++c) {
      if (c >= cols) {
        EXPECT_EQ(x[t * stride + c], before[t * stride + c]) << "beyond the columns";
        continue;
      }
      const double exact = expected(before.data() + t * stride, cols, c,
                                    static_cast<double>(weight[c]), static_cast<double>(1e-6F));
      EXPECT_NEAR(x[t * stride + c], exact, kTolerance * std::fabs(exact));
    }
  }
}

TEST(RmsNorm, ARowOfZerosGivesZeros) {
  const std::vector<float> zeros(33);
  const std::vector<float> weight = random_values(33, 5);
  std::vector<float> y(33, 1.0F);
  rms_norm({zeros.data(), 1, 33}, weight.data(), 1e-5F, {y.data(), 1, 33});
  for (const float value : y) EXPECT_EQ(value, 0.0F);
}

// A plain float32 running sum of equal terms stops growing at 2^24 of them.
TEST(RmsNorm, TheMeanOfALongRowIsAccurate) {
  const std::int64_t cols = std::int64_t{1} << 25;
  const std::vector<float> x(static_cast<std::size_t>(cols), 0.1F);
  const std::vector<float> weight(static_cast<std::size_t>(cols), 1.0F);
  std::vector<float> y(x.size());
  rms_norm({x.data(), 1, cols}, weight.data(), 0.0F, {y.data(), 1, cols});
  EXPECT_NEAR(y.front(), 1.0, kTolerance);
  EXPECT_EQ(y.front(), y.back());
}

TEST(RmsNorm, HeadsAreNormalisedOneByOne) {
  const std::int64_t tokens = 3;
  const std::int64_t heads = 5;
  const std::int64_t head_dim = 20;
  const std::int64_t stride = heads * head_dim + 7;
  std::vector<float> x = random_values(tokens * stride, 6);
  const std::vector<float> before = x;
  const std::vector<float> weight = random_values(head_dim, 7);
  rms_norm_heads(HeadsView<float>{x.data(), tokens, heads, head_dim, stride}, weight.data(), 1e-6F,
                 true);
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t d = 0; d < head_dim; ++d) {
        const std::int64_t head = t * stride + h * head_dim;
        const double exact =
            expected(before.data() + head, head_dim, d, 1.0 + static_cast<double>(weight[d]),
                     static_cast<double>(1e-6F));
        EXPECT_NEAR(x[head + d], exact, kTolerance * std::fabs(exact));
      }
    }
    for (std::int64_t i = heads * head_dim; i < stride; ++i)
      EXPECT_EQ(x[t * stride + i], before[t * stride + i]) << "beyond the heads";
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
