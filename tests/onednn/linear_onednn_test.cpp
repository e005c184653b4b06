// SPDX-License-Identifier: MIT
// Products of chunks through oneDNN, asked for on a processor that may have no AMX tiles: the same
// calls then take AVX512_BF16. Compiled with the kernels in the unit, as a program with
// SLUICE_ONEDNN is.
#include "sluice/backend/cpu/linear_onednn.hpp"

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/core/error.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/nn/linear.hpp"
#include "support/count_allocations.hpp"
#include "support/random_matrix.hpp"

namespace sluice {
namespace {

using test::random_values;
using test::RandomMatrix;

constexpr ElementType kRoundedTypes[] = {ElementType::kBF16, ElementType::kQ8_0,
                                         ElementType::kQ4_0, ElementType::kQ4_1,
                                         ElementType::kQ4_K, ElementType::kQ6_K};

std::vector<std::int64_t> columns_of(ElementType type) {
  switch (block_shape(type).values) {
    case 1: return {1, 7, 33, 130, 576};
    case 32: return {32, 96, 576};
    default: return {256, 768};
  }
}

// The nearest bf16, ties to even, by arithmetic on the bits of a finite float.
double rounded(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t low = bits & 0xffffU;
  std::uint32_t high = bits >> 16;
  if (low > 0x8000U || (low == 0x8000U && (high & 1U) != 0)) ++high;
  return static_cast<double>(std::bit_cast<float>(high << 16));
}

class LinearOneDnn : public testing::Test {
 protected:
  void SetUp() override {
    if (!detail::OneDnnProducts::has_pairs()) GTEST_SKIP() << "no products of bf16 here";
  }
};

struct Product {
  const RandomMatrix& weight;
  std::int64_t tokens;
  Activations activations = Activations::kInt8;
  bool accumulate = false;
  const float* bias = nullptr;
  float start = std::numeric_limits<float>::quiet_NaN();
};

std::vector<float> multiply(const Product& product, const std::vector<float>& x, OneDnn onednn,
                            int team_size) {
  const WeightMatrix& weight = product.weight.view;
  LinearWorkspace workspace(weight.cols, team_size, product.activations, 512, onednn);
  EXPECT_EQ(workspace.uses_onednn(), onednn == OneDnn::kAlways);
  ThreadTeam team(team_size);
  std::vector<float> y(static_cast<std::size_t>(product.tokens * weight.rows), product.start);
  const LinearTask task{.weight = weight,
                        .bias = product.bias,
                        .y = {y.data(), product.tokens, weight.rows},
                        .accumulate = product.accumulate};
  linear_many({&task, 1}, {x.data(), product.tokens, weight.cols}, workspace, team);
  return y;
}

// Against float64 sums of the rounded factors: products are exact in float32, and each of them and
// each partial sum is rounded at most cols + 16 times by 2^-24 of the absolute sum. Where both
// factors are rounded, unrounded sums are within 2^-7 + 2^-16 of it as well, which is what callers
// are told.
void expect_sums(const Product& product, const std::vector<float>& x, const std::vector<float>& y) {
  const WeightMatrix& weight = product.weight.view;
  for (std::int64_t t = 0; t < product.tokens; ++t) {
    for (std::int64_t r = 0; r < weight.rows; ++r) {
      double sum = product.accumulate ? static_cast<double>(product.start) : 0.0;
      if (product.bias != nullptr) sum += static_cast<double>(product.bias[r]);
      double exact = sum;
      double absolute = product.accumulate ? std::fabs(static_cast<double>(product.start)) : 0.0;
      if (product.bias != nullptr) absolute += std::fabs(static_cast<double>(product.bias[r]));
      double exact_terms = 0.0;
      for (std::int64_t c = 0; c < weight.cols; ++c) {
        const float value = x[static_cast<std::size_t>(t * weight.cols + c)];
        const float w = product.weight.values[static_cast<std::size_t>(r * weight.cols + c)];
        const double term = rounded(value) * rounded(w);
        sum += term;
        absolute += std::fabs(term);
        exact += static_cast<double>(value) * static_cast<double>(w);
        exact_terms += std::fabs(static_cast<double>(value) * static_cast<double>(w));
      }
      const auto found = static_cast<double>(y[static_cast<std::size_t>(t * weight.rows + r)]);
      const double float_error = static_cast<double>(weight.cols + 16) * 0x1p-24 * absolute;
      ASSERT_NEAR(found, sum, float_error)
          << to_string(weight.type) << " [" << weight.rows << ", " << weight.cols << "], row " << r
          << ", token " << t << " of " << product.tokens;
      const double factors = weight.type == ElementType::kBF16 ? 0x1p-8 : 0x1p-7 + 0x1p-16;
      ASSERT_NEAR(found, exact, factors * exact_terms + float_error);
    }
  }
}

TEST_F(LinearOneDnn, MatchesFloat64SumsOfRoundedFactors) {
  // Tiles are of 64 rows, blocks of 32 to 512 tokens.
  constexpr std::int64_t kTokens[] = {32, 33, 95, 130};
  unsigned seed = 1;
  for (const ElementType type : kRoundedTypes) {
    for (const std::int64_t cols : columns_of(type)) {
      for (const std::int64_t rows : {1, 64, 130}) {
        const RandomMatrix weight(type, rows, cols, seed);
        const std::vector<float> bias = random_values(rows, ++seed);
        const Product product{.weight = weight, .tokens = kTokens[seed % std::size(kTokens)]};
        const std::vector<float> x = random_values(product.tokens * cols, ++seed);
        expect_sums(product, x, multiply(product, x, OneDnn::kAlways, 2));
        Product added = product;
        added.bias = rows % 2 == 0 ? bias.data() : nullptr;
        added.accumulate = true;
        added.start = -1.25F;
        expect_sums(added, x, multiply(added, x, OneDnn::kAlways, 2));
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(LinearOneDnn, ChunksOfAnyLength) {
  for (const ElementType type : {ElementType::kBF16, ElementType::kQ8_0}) {
    const RandomMatrix weight(type, 70, 96, 7);
    for (const std::int64_t tokens : {64, 255, 287, 511, 512, 513, 545, 1100}) {
      const Product product{.weight = weight, .tokens = tokens};
      const std::vector<float> x = random_values(tokens * 96, 8);
      expect_sums(product, x, multiply(product, x, OneDnn::kAlways, 2));
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(LinearOneDnn, IsTheSameBitsForAnyTeamSize) {
  for (const ElementType type : kRoundedTypes) {
    const std::int64_t cols = columns_of(type).back();
    const RandomMatrix weight(type, 200, cols, 9);
    const Product product{.weight = weight, .tokens = 100};
    const std::vector<float> x = random_values(100 * cols, 10);
    const std::vector<float> expected = multiply(product, x, OneDnn::kAlways, 1);
    for (const int team_size : {2, 3, 5}) {
      const std::vector<float> y = multiply(product, x, OneDnn::kAlways, team_size);
      EXPECT_EQ(std::memcmp(y.data(), expected.data(), y.size() * sizeof(float)), 0)
          << to_string(type) << ", " << team_size << " members";
    }
  }
}

// Where it does not come in, the bits are those of a workspace without it: few tokens, weights that
// are never rounded or not under these activations, columns that it was not made for.
TEST_F(LinearOneDnn, LeavesTheRestAsItIs) {
  const auto same_bits = [](const RandomMatrix& weight, std::int64_t tokens,
                            Activations activations) {
    const Product product{.weight = weight, .tokens = tokens, .activations = activations};
    const std::vector<float> x = random_values(tokens * weight.view.cols, 12);
    const std::vector<float> ours = multiply(product, x, OneDnn::kNever, 2);
    const std::vector<float> y = multiply(product, x, OneDnn::kAlways, 2);
    return std::memcmp(y.data(), ours.data(), y.size() * sizeof(float)) == 0;
  };
  for (const ElementType type : kRoundedTypes)
    for (const std::int64_t tokens : {1, 8, 31})
      EXPECT_TRUE(same_bits(RandomMatrix(type, 70, columns_of(type).back(), 11), tokens,
                            Activations::kInt8))
          << to_string(type) << ", " << tokens << " tokens";
  for (const ElementType type : {ElementType::kF32, ElementType::kF16})
    EXPECT_TRUE(same_bits(RandomMatrix(type, 70, 130, 13), 64, Activations::kInt8));
  EXPECT_TRUE(same_bits(RandomMatrix(ElementType::kQ8_0, 70, 96, 14), 64, Activations::kBf16));
  // The comparison can tell: with 32 tokens they differ.
  EXPECT_FALSE(same_bits(RandomMatrix(ElementType::kQ8_0, 70, 576, 15), 32, Activations::kInt8));

  const RandomMatrix weight(ElementType::kQ8_0, 70, 96, 16);
  const std::vector<float> x = random_values(std::int64_t{64} * 96, 17);
  constexpr std::int64_t kOthers[] = {64, 128};
  LinearWorkspace workspace(128, 1, Activations::kInt8, 512, OneDnn::kAlways, kOthers);
  ThreadTeam team(1);
  std::vector<float> y(std::size_t{64} * 70);
  linear(weight.view, {x.data(), 64, 96}, nullptr, {y.data(), 64, 70}, workspace, team);
  EXPECT_EQ(y, multiply({.weight = weight, .tokens = 64}, x, OneDnn::kNever, 1));
}

TEST_F(LinearOneDnn, TasksOfOneCallAndStridedViews) {
  const RandomMatrix query(ElementType::kQ8_0, 130, 96, 18);
  const RandomMatrix key(ElementType::kQ8_0, 64, 96, 19);
  const RandomMatrix value(ElementType::kBF16, 33, 96, 20);
  constexpr std::int64_t kTokens = 77;
  constexpr std::int64_t kStride = 96 + 5;
  const std::vector<float> strided = random_values(kTokens * kStride, 21);
  std::vector<float> x;
  for (std::int64_t t = 0; t < kTokens; ++t)
    x.insert(x.end(), strided.begin() + t * kStride, strided.begin() + t * kStride + 96);
  // One buffer, [tokens, 130 + 64 + 33 + 4], of which the last 4 belong to nobody.
  constexpr std::int64_t kWidth = 231;
  std::vector<float> y(static_cast<std::size_t>(kTokens * kWidth),
                       std::numeric_limits<float>::quiet_NaN());
  const RandomMatrix* const weights[] = {&query, &key, &value};
  std::vector<LinearTask> tasks;
  std::int64_t column = 0;
  for (const RandomMatrix* weight : weights) {
    tasks.push_back(
        {.weight = weight->view, .y = {y.data() + column, kTokens, weight->view.rows, kWidth}});
    column += weight->view.rows;
  }
  LinearWorkspace workspace(96, 2, Activations::kInt8, 512, OneDnn::kAlways);
  ThreadTeam team(2);
  linear_many(tasks, {strided.data(), kTokens, 96, kStride}, workspace, team);
  column = 0;
  for (const RandomMatrix* weight : weights) {
    std::vector<float> own;
    for (std::int64_t t = 0; t < kTokens; ++t)
      own.insert(own.end(), y.begin() + t * kWidth + column,
                 y.begin() + t * kWidth + column + weight->view.rows);
    expect_sums({.weight = *weight, .tokens = kTokens}, x, own);
    column += weight->view.rows;
  }
  for (std::int64_t t = 0; t < kTokens; ++t)
    for (std::int64_t c = column; c < kWidth; ++c)
      ASSERT_TRUE(std::isnan(y[static_cast<std::size_t>(t * kWidth + c)])) << t << ", " << c;
}

TEST_F(LinearOneDnn, InfinityAndNanStayInTheirToken) {
  const RandomMatrix weight(ElementType::kQ8_0, 70, 96, 22);
  for (const float poison :
       {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    std::vector<float> x = random_values(std::int64_t{40} * 96, 23);
    x[33 * 96 + 50] = poison;
    const std::vector<float> y = multiply({.weight = weight, .tokens = 40}, x, OneDnn::kAlways, 2);
    for (std::size_t t = 0; t < 40; ++t)
      for (std::size_t r = 0; r < 70; ++r) EXPECT_EQ(std::isfinite(y[t * 70 + r]), t != 33);
  }
}

TEST_F(LinearOneDnn, IsChosenWhereTheProcessorHasTiles) {
  EXPECT_EQ(LinearWorkspace(96, 1, Activations::kInt8).uses_onednn(),
            detail::OneDnnProducts::has_tiles());
  EXPECT_FALSE(LinearWorkspace(96, 1, Activations::kFloat32).uses_onednn());
  EXPECT_FALSE(LinearWorkspace(96, 1, Activations::kInt8, 512, OneDnn::kNever).uses_onednn());
  // Never more than 31 tokens: nothing for it to do, and nothing held for it.
  const LinearWorkspace small(96, 1, Activations::kInt8, 31, OneDnn::kAlways);
  EXPECT_FALSE(small.uses_onednn());
  const LinearWorkspace without(96, 3, Activations::kInt8, 512, OneDnn::kNever);
  const LinearWorkspace with(96, 3, Activations::kInt8, 512, OneDnn::kAlways);
  EXPECT_GE(with.bytes(), without.bytes() + 2 * 96 * (512 + 3 * 64) + 3 * 4 * 512 * 64);
}

template <class Function>
std::string config_error(Function&& function) {
  try {
    function();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kConfig);
    return error.what();
  }
  return {};
}

TEST_F(LinearOneDnn, SaysWhatCannotBeHad) {
  const std::string kept =
      config_error([] { LinearWorkspace(96, 1, Activations::kFloat32, 512, OneDnn::kAlways); });
  EXPECT_NE(kept.find("onednn"), std::string::npos) << kept;
  for (const std::int64_t cols : {std::int64_t{0}, std::int64_t{97}}) {
    const std::string out_of_range = config_error([&] {
      LinearWorkspace(96, 1, Activations::kInt8, 512, OneDnn::kAlways, {&cols, 1});
    });
    EXPECT_NE(out_of_range.find("onednn_cols"), std::string::npos) << out_of_range;
  }
}

std::int64_t threads_of_process() {
  return std::distance(std::filesystem::directory_iterator("/proc/self/task"), {});
}

// Threads are the team's, and what a chunk allocates is oneDNN's six blocks for each tile of rows
// and block of tokens, whichever member takes it; few tokens allocate nothing.
TEST_F(LinearOneDnn, StartsNoThreadsAndAllocatesLittle) {
  const RandomMatrix weight(ElementType::kQ8_0, 300, 576, 24);  // 5 tiles
  const std::vector<float> x = random_values(std::int64_t{288} * 576, 25);
  std::vector<float> y(std::size_t{288} * 300);
  LinearWorkspace workspace(576, 2, Activations::kInt8, 512, OneDnn::kAlways);
  ThreadTeam team(2);
  const auto allocations_of = [&](std::int64_t tokens) {
    const LinearTask task{.weight = weight.view, .y = {y.data(), tokens, 300}};
    const std::int64_t before = test::allocation_count();
    linear_many({&task, 1}, {x.data(), tokens, 576}, workspace, team);
    return test::allocation_count() - before;
  };
  const std::int64_t threads = threads_of_process();
  for (int i = 0; i < 20; ++i) {
    EXPECT_LE(allocations_of(288), 6 * 5 * 2);  // 256 and 32 tokens
    EXPECT_LE(allocations_of(512 / 2), 6 * 5);
    EXPECT_EQ(allocations_of(31), 0);
    EXPECT_EQ(allocations_of(1), 0);
  }
  EXPECT_EQ(threads_of_process(), threads);
}

}  // namespace
}  // namespace sluice
