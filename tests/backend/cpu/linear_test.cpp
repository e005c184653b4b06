// SPDX-License-Identifier: MIT
#include "sluice/nn/linear.hpp"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/backend/cpu/linear_task.hpp"
#include "support/random_matrix.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

constexpr ElementType kTypes[] = {ElementType::kF32,  ElementType::kF16,  ElementType::kBF16,
                                  ElementType::kQ8_0, ElementType::kQ4_0, ElementType::kQ4_1,
                                  ElementType::kQ4_K, ElementType::kQ6_K};

using test::random_values;
using test::RandomMatrix;

struct Shape {
  std::int64_t rows;
  std::int64_t cols;
};

std::vector<Shape> shapes_of(ElementType type) {
  switch (block_shape(type).values) {
    case 1: return {{1, 1}, {3, 7}, {37, 50}, {35, 129}, {13, 576}, {70, 300}, {33, 1601}};
    case 32: return {{1, 32}, {5, 96}, {37, 64}, {35, 160}, {13, 576}, {70, 224}, {33, 1568}};
    default: return {{1, 256}, {5, 768}, {37, 512}, {70, 1024}};
  }
}

// Each output within the bound of a float32 sum: every term and partial sum is rounded at most
// `cols` + 16 times (in fact about cols / kWidth times), each by 2^-24 of the absolute sum. That
// allows for the worst case. Rounding errors of a running sum of n independent terms have a root
// mean square of sqrt(n / 6) units of the terms' own, so sqrt(cols) / 2 + 4 units is what all
// outputs together may show.
void expect_near(const RandomMatrix& weight, const std::vector<float>& x, const float* bias,
                 const std::vector<float>& start, MatrixView<const float> y) {
  double error_squares = 0.0;
  double scale_squares = 0.0;
  const std::int64_t cols = weight.view.cols;
  for (std::int64_t t = 0; t < y.rows; ++t) {
    for (std::int64_t r = 0; r < weight.view.rows; ++r) {
      double sum = bias != nullptr ? static_cast<double>(bias[r]) : 0.0;
      if (!start.empty()) sum += static_cast<double>(start[t * weight.view.rows + r]);
      double absolute = std::fabs(sum);
      double squares = sum * sum;
      for (std::int64_t c = 0; c < cols; ++c) {
        const auto value = static_cast<double>(x[t * cols + c]);
        sum += value * static_cast<double>(weight.values[r * cols + c]);
        const double term = std::fabs(value) * static_cast<double>(weight.magnitudes[r * cols + c]);
        absolute += term;
        squares += term * term;
      }
      const double error = static_cast<double>(y.row(t)[r]) - sum;
      ASSERT_LE(std::fabs(error), static_cast<double>(cols + 16) * 0x1p-24 * absolute)
          << to_string(weight.view.type) << " [" << weight.view.rows << ", " << cols << "], row "
          << r << ", token " << t << " of " << y.rows << ": " << y.row(t)[r] << " for " << sum;
      error_squares += error * error;
      scale_squares += squares;
    }
  }
  EXPECT_LE(std::sqrt(error_squares),
            (std::sqrt(static_cast<double>(cols)) / 2.0 + 4.0) * 0x1p-24 * std::sqrt(scale_squares))
      << to_string(weight.view.type) << " [" << weight.view.rows << ", " << cols << "], " << y.rows
      << " tokens";
}

class Linear : public testing::TestWithParam<ElementType> {};

TEST_P(Linear, MatchesFloat64Sums) {
  LinearWorkspace workspace(1601, 2);
  ThreadTeam team(2);
  std::vector<std::int64_t> token_counts = {130};
  for (std::int64_t tokens = 1; tokens <= 40; ++tokens) token_counts.push_back(tokens);
  for (const Shape shape : shapes_of(GetParam())) {
    const RandomMatrix weight(GetParam(), shape.rows, shape.cols, 1);
    const std::vector<float> bias = random_values(shape.rows, 2);
    for (const std::int64_t tokens : token_counts) {
      const std::vector<float> x = random_values(tokens * shape.cols, 3);
      std::vector<float> y(static_cast<std::size_t>(tokens * shape.rows), 1e30F);
      const MatrixView<float> y_view{y.data(), tokens, shape.rows};
      const MatrixView<const float> x_view{x.data(), tokens, shape.cols};
      linear(weight.view, x_view, nullptr, y_view, workspace, team);
      expect_near(weight, x, nullptr, {}, y_view);
      linear(weight.view, x_view, bias.data(), y_view, workspace, team);
      expect_near(weight, x, bias.data(), {}, y_view);
      const std::vector<float> start = y;
      linear_add(weight.view, x_view, tokens % 2 == 0 ? bias.data() : nullptr, y_view, workspace,
                 team);
      expect_near(weight, x, tokens % 2 == 0 ? bias.data() : nullptr, start, y_view);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(Linear, ReferenceMatchesFloat64Sums) {
  const Shape shape = shapes_of(GetParam()).back();
  const RandomMatrix weight(GetParam(), shape.rows, shape.cols, 4);
  const std::vector<float> bias = random_values(shape.rows, 5);
  const std::vector<float> x = random_values(3 * shape.cols, 6);
  std::vector<float> y(static_cast<std::size_t>(3 * shape.rows));
  LinearWorkspace workspace(shape.cols, 1);
  ThreadTeam team(1);
  linear(weight.view, MatrixView<const float>{x.data(), 3, shape.cols}, bias.data(),
         MatrixView<float>{y.data(), 3, shape.rows}, workspace, team, generic_backend{});
  for (std::int64_t t = 0; t < 3; ++t) {
    for (std::int64_t r = 0; r < shape.rows; ++r) {
      auto sum = static_cast<double>(bias[r]);
      for (std::int64_t c = 0; c < shape.cols; ++c)
        sum += static_cast<double>(weight.values[r * shape.cols + c]) *
               static_cast<double>(x[t * shape.cols + c]);
      // The same sums in the same order, so only the final rounding may show.
      EXPECT_EQ(y[t * shape.rows + r], static_cast<float>(sum));
    }
  }
}

TEST_P(Linear, IsTheSameBitsForAnyTeamSize) {
  for (const Shape shape : shapes_of(GetParam())) {
    const RandomMatrix weight(GetParam(), shape.rows, shape.cols, 7);
    for (const std::int64_t tokens : {1, 2, 3, 7, 8, 9, 25}) {
      const std::vector<float> x = random_values(tokens * shape.cols, 8);
      std::vector<float> expected;
      for (const int team_size : {1, 2, 3, 5}) {
        LinearWorkspace workspace(shape.cols, team_size);
        ThreadTeam team(team_size);
        std::vector<float> y(static_cast<std::size_t>(tokens * shape.rows));
        linear(weight.view, MatrixView<const float>{x.data(), tokens, shape.cols}, nullptr,
               MatrixView<float>{y.data(), tokens, shape.rows}, workspace, team);
        if (team_size == 1) expected = y;
        ASSERT_EQ(std::memcmp(y.data(), expected.data(), y.size() * sizeof(float)), 0)
            << team_size << " members, " << tokens << " tokens, [" << shape.rows << ", "
            << shape.cols << "]";
      }
    }
  }
}

// A token among a few is computed as if it were alone, so speculative and chunked decoding agree
// with token-by-token decoding bit for bit on this path.
TEST_P(Linear, FewTokensAreTheSameBitsAsOne) {
  const Shape shape = shapes_of(GetParam()).back();
  const RandomMatrix weight(GetParam(), shape.rows, shape.cols, 9);
  LinearWorkspace workspace(shape.cols, 2);
  ThreadTeam team(2);
  const std::int64_t tokens = detail::kStreamTokens;
  const std::vector<float> x = random_values(tokens * shape.cols, 10);
  std::vector<float> together(static_cast<std::size_t>(tokens * shape.rows));
  std::vector<float> alone = together;
  const MatrixView<const float> x_view{x.data(), tokens, shape.cols};
  const MatrixView<float> alone_view{alone.data(), tokens, shape.rows};
  linear(weight.view, x_view, nullptr, MatrixView<float>{together.data(), tokens, shape.rows},
         workspace, team);
  for (std::int64_t t = 0; t < tokens; ++t)
    linear(weight.view, x_view.middle_rows(t, 1), nullptr, alone_view.middle_rows(t, 1), workspace,
           team);
  EXPECT_EQ(together, alone);
}

TEST_P(Linear, KeepsToItsViews) {
  const Shape shape = shapes_of(GetParam()).back();
  const RandomMatrix weight(GetParam(), shape.rows, shape.cols, 11);
  LinearWorkspace workspace(shape.cols, 2);
  ThreadTeam team(2);
  for (const std::int64_t tokens : {1, 5, 20}) {
    const std::int64_t x_stride = shape.cols + 3;
    const std::int64_t y_stride = shape.rows + 5;
    const std::vector<float> wide_x = random_values(tokens * x_stride, 12);
    std::vector<float> x;
    for (std::int64_t t = 0; t < tokens; ++t)
      x.insert(x.end(), wide_x.begin() + t * x_stride, wide_x.begin() + t * x_stride + shape.cols);
    std::vector<float> wide_y(static_cast<std::size_t>(tokens * y_stride), -7.0F);
    const MatrixView<float> y{wide_y.data(), tokens, shape.rows, y_stride};
    linear(weight.view, MatrixView<const float>{wide_x.data(), tokens, shape.cols, x_stride},
           nullptr, y, workspace, team);
    expect_near(weight, x, nullptr, {}, y);
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t r = shape.rows; r < y_stride; ++r)
        ASSERT_EQ(wide_y[t * y_stride + r], -7.0F) << "beyond the rows of token " << t;
  }
}

INSTANTIATE_TEST_SUITE_P(Types, Linear, testing::ValuesIn(kTypes),
                         [](const auto& each) { return std::string(to_string(each.param)); });

TEST(LinearMany, EqualsSeparateProductsWhateverTheTypes) {
  const RandomMatrix a(ElementType::kQ4_1, 70, 256, 15);
  const RandomMatrix b(ElementType::kQ4_1, 3, 256, 16);
  const RandomMatrix c(ElementType::kQ6_K, 41, 256, 17);
  const RandomMatrix d(ElementType::kF32, 1, 256, 18);
  const RandomMatrix* matrices[] = {&a, &b, &c, &d};
  LinearWorkspace workspace(256, 3);
  ThreadTeam team(3);
  const std::vector<float> bias = random_values(70, 19);
  for (const std::int64_t tokens : {1, 6, 21}) {
    const std::vector<float> x = random_values(tokens * 256, 20);
    const MatrixView<const float> x_view{x.data(), tokens, 256};
    std::vector<std::vector<float>> together;
    std::vector<std::vector<float>> separate;
    std::vector<LinearTask> tasks;
    for (const RandomMatrix* matrix : matrices) {
      together.push_back(random_values(tokens * matrix->view.rows, 21));
      separate.push_back(together.back());
    }
    for (std::size_t i = 0; i < 4; ++i) {
      const std::int64_t rows = matrices[i]->view.rows;
      tasks.push_back({.weight = matrices[i]->view,
                       .bias = i < 3 ? bias.data() : nullptr,
                       .y = {together[i].data(), tokens, rows},
                       .accumulate = i == 2});
      const MatrixView<float> y{separate[i].data(), tokens, rows};
      if (i == 2)
        linear_add(matrices[i]->view, x_view, bias.data(), y, workspace, team);
      else
        linear(matrices[i]->view, x_view, tasks[i].bias, y, workspace, team);
    }
    linear_many(tasks, x_view, workspace, team);
    EXPECT_EQ(together, separate);
  }
}

TEST(LinearMany, NoTokensDoNothing) {
  const RandomMatrix weight(ElementType::kQ8_0, 4, 32, 22);
  LinearWorkspace workspace(32, 1);
  ThreadTeam team(1);
  linear(weight.view, MatrixView<const float>{nullptr, 0, 32}, nullptr,
         MatrixView<float>{nullptr, 0, 4}, workspace, team);
}

TEST(LinearWorkspace, RefusesExtentsThatAreNotPositive) {
  for (const auto& [cols, members] : {std::pair{0, 1}, std::pair{32, 0}}) {
    try {
      LinearWorkspace workspace(cols, members);
      FAIL() << cols << " columns, " << members << " members";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kConfig);
      EXPECT_EQ(error.detail().field, cols == 0 ? "max_cols" : "team_size");
    }
  }
}

TEST(WeightMatrix, ValidationNamesWhatIsWrong) {
  const float data[64] = {};
  validate({ElementType::kQ8_0, data, 2, 64}, "w");
  const auto field_of = [](const WeightMatrix& matrix) -> std::string {
    try {
      validate(matrix, "blk.0.w");
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kShape);
      EXPECT_EQ(error.detail().where, "blk.0.w");
      return error.detail().field + " " + error.detail().expected;
    }
    return "none";
  };
  EXPECT_EQ(field_of({ElementType::kF32, data, 0, 64}), "rows at least 1");
  EXPECT_EQ(field_of({ElementType::kF32, data, 2, 0}), "cols at least 1");
  EXPECT_EQ(field_of({ElementType::kQ4_1, data, 2, 40}), "cols a multiple of 32");
  EXPECT_EQ(field_of({ElementType::kQ6_K, data, 2, 288}), "cols a multiple of 256");
  EXPECT_EQ(field_of({ElementType::kF32, nullptr, 2, 64}), "data an address");
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
