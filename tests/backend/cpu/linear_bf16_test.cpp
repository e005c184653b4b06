// SPDX-License-Identifier: MIT
// Products of bf16 weights with activations rounded to bf16 against a plain loop over their
// definition, bit for bit and for every way of cutting the work; and against exact products within
// the documented bound.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/nn/linear.hpp"
#include "support/kernel_arithmetic.hpp"
#include "support/random_matrix.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::multiply_add;
using test::random_values;
using test::RandomMatrix;

// One output from the definition: four chains of column pairs, the second of a pair first.
float expected_product(const float* weights, const float* x, std::int64_t cols) {
  const auto weight = [&](std::int64_t c) {
    return c < cols ? weights[c] : 0.0F;
  };
  const auto activation = [&](std::int64_t c) {
    return c < cols ? static_cast<float>(bf16(x[c])) : 0.0F;
  };
  float chains[4] = {};
  for (std::int64_t c = 0; c < cols; c += 2) {
    float& chain = chains[c / 2 % 4];
    chain = multiply_add(weight(c + 1), activation(c + 1), chain);
    chain = multiply_add(weight(c), activation(c), chain);
  }
  return (chains[0] + chains[2]) + (chains[1] + chains[3]);
}

struct Shape {
  std::int64_t rows;
  std::int64_t cols;
};
// Fewer columns than a step, odd ones, whole registers; fewer rows than a pass, more than a panel.
constexpr Shape kShapes[] = {{1, 1}, {3, 7}, {5, 32}, {37, 64}, {35, 97}, {70, 200}, {13, 576}};

TEST(LinearBf16, IsItsDefinitionBitForBitHoweverTheWorkIsCut) {
  constexpr std::int64_t kTokens = 29;
  for (const Shape shape : kShapes) {
    const RandomMatrix weight(ElementType::kBF16, shape.rows, shape.cols, 1);
    const std::vector<float> x = random_values(kTokens * shape.cols, 2);
    const std::vector<float> bias = random_values(shape.rows, 3);
    const std::vector<float> start = random_values(kTokens * shape.rows, 4);
    std::vector<float> expected;
    for (std::int64_t t = 0; t < kTokens; ++t)
      for (std::int64_t r = 0; r < shape.rows; ++r)
        expected.push_back(expected_product(weight.values.data() + r * shape.cols,
                                            x.data() + t * shape.cols, shape.cols));

    for (const Activations activations : {Activations::kBf16, Activations::kInt8}) {
      for (const int team_size : {1, 2, 3}) {
        // Ten rounded tokens at a time, so that the longer chunks come in several parts.
        LinearWorkspace workspace(shape.cols, team_size, activations, 10);
        ThreadTeam team(team_size);
        for (const std::int64_t chunk : {1, 2, 3, 4, 5, 8, 9, 13, 29}) {
          for (const bool accumulate : {false, true}) {
            std::vector<float> y = start;
            for (std::int64_t first = 0; first < kTokens; first += chunk) {
              const std::int64_t tokens = std::min(chunk, kTokens - first);
              const MatrixView<const float> chunk_x{x.data() + first * shape.cols, tokens,
                                                    shape.cols};
              const MatrixView<float> chunk_y{y.data() + first * shape.rows, tokens, shape.rows};
              if (accumulate)
                linear_add(weight.view, chunk_x, bias.data(), chunk_y, workspace, team);
              else
                linear(weight.view, chunk_x, nullptr, chunk_y, workspace, team);
            }
            for (std::size_t i = 0; i < y.size(); ++i) {
              const auto row = i % static_cast<std::size_t>(shape.rows);
              const float wanted = accumulate ? start[i] + (expected[i] + bias[row]) : expected[i];
              ASSERT_EQ(y[i], wanted) << "[" << shape.rows << ", " << shape.cols << "], row " << row
                                      << ", chunks of " << chunk << ", " << team_size << " members";
            }
          }
        }
      }
    }
  }
}

// Rounding an activation changes it by at most 2^-8 of itself (1 + 2^-8, half a step from 1,
// becomes 1), which random ones don't all come near: of their sums half of that is allowed. Each of
// a chain's cols / 4 additions and the three after them rounds by at most 2^-24 of the terms'
// magnitudes.
TEST(LinearBf16, IsWithinItsBoundOfTheExactProduct) {
  const RandomMatrix weight(ElementType::kBF16, 70, 1000, 5);
  LinearWorkspace workspace(1000, 2, Activations::kBf16);
  ThreadTeam team(2);
  for (const std::int64_t tokens : {1, 20}) {
    const std::vector<float> x = random_values(tokens * 1000, 6);
    std::vector<float> y(static_cast<std::size_t>(tokens * 70));
    linear(weight.view, MatrixView<const float>{x.data(), tokens, 1000}, nullptr,
           MatrixView<float>{y.data(), tokens, 70}, workspace, team);
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (std::int64_t r = 0; r < 70; ++r) {
        double sum = 0.0;
        double terms = 0.0;
        for (std::int64_t c = 0; c < 1000; ++c) {
          const double term =
              static_cast<double>(x[static_cast<std::size_t>(t * 1000 + c)]) *
              static_cast<double>(weight.values[static_cast<std::size_t>(r * 1000 + c)]);
          sum += term;
          terms += std::fabs(term);
        }
        EXPECT_NEAR(static_cast<double>(y[static_cast<std::size_t>(t * 70 + r)]), sum,
                    (0x1p-9 + 260 * 0x1p-24) * terms);
      }
    }
  }
}

TEST(LinearBf16, InfinityAndNanStayInTheirToken) {
  const RandomMatrix weight(ElementType::kBF16, 37, 96, 7);
  LinearWorkspace workspace(96, 1, Activations::kBf16);
  ThreadTeam team(1);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const float poison : {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
    for (const std::int64_t tokens : {1, 3, 20}) {
      std::vector<float> x = random_values(tokens * 96, 8);
      x[static_cast<std::size_t>((tokens - 1) * 96 + 40)] = poison;
      std::vector<float> y(static_cast<std::size_t>(tokens * 37));
      linear(weight.view, MatrixView<const float>{x.data(), tokens, 96}, nullptr,
             MatrixView<float>{y.data(), tokens, 37}, workspace, team);
      for (std::int64_t t = 0; t < tokens; ++t)
        for (std::int64_t r = 0; r < 37; ++r)
          EXPECT_EQ(std::isfinite(y[static_cast<std::size_t>(t * 37 + r)]), t < tokens - 1);
    }
  }
}

TEST(LinearBf16, KeepsToItsViews) {
  constexpr Shape kShape{70, 203};
  const RandomMatrix weight(ElementType::kBF16, kShape.rows, kShape.cols, 9);
  LinearWorkspace workspace(kShape.cols, 2, Activations::kBf16);
  ThreadTeam team(2);
  for (const std::int64_t tokens : {1, 5, 20}) {
    const std::int64_t x_stride = kShape.cols + 3;
    const std::int64_t y_stride = kShape.rows + 5;
    const std::vector<float> x = random_values((tokens - 1) * x_stride + kShape.cols, 10);
    std::vector<float> y(static_cast<std::size_t>(tokens * y_stride), -7.0F);
    linear(weight.view, MatrixView<const float>{x.data(), tokens, kShape.cols, x_stride}, nullptr,
           MatrixView<float>{y.data(), tokens, kShape.rows, y_stride}, workspace, team);
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t r = 0; r < y_stride; ++r)
        ASSERT_EQ(y[static_cast<std::size_t>(t * y_stride + r)],
                  r < kShape.rows ? expected_product(weight.values.data() + r * kShape.cols,
                                                     x.data() + t * x_stride, kShape.cols)
                                  : -7.0F);
  }
}

TEST(LinearBf16, QuantisedAndOtherPlainWeightsKeepFloat32Activations) {
  LinearWorkspace workspace(256, 2, Activations::kBf16);
  LinearWorkspace exact(256, 2);
  ThreadTeam team(2);
  for (const ElementType type :
       {ElementType::kF32, ElementType::kF16, ElementType::kQ8_0, ElementType::kQ6_K}) {
    const RandomMatrix weight(type, 41, 256, 11);
    for (const std::int64_t tokens : {1, 21}) {
      const std::vector<float> x = random_values(tokens * 256, 12);
      const MatrixView<const float> x_view{x.data(), tokens, 256};
      std::vector<float> y(static_cast<std::size_t>(tokens * 41));
      std::vector<float> wanted(y.size());
      linear(weight.view, x_view, nullptr, MatrixView<float>{y.data(), tokens, 41}, workspace,
             team);
      linear(weight.view, x_view, nullptr, MatrixView<float>{wanted.data(), tokens, 41}, exact,
             team);
      EXPECT_EQ(y, wanted);
    }
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
