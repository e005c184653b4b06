// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/sluice.cuh>

#include <sluice/core/random.hpp>

#include "support/test_unit.hpp"

#include "backend/cuda/device_test.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using sluice_test::random_floats;
using sluice_test::rounded_to;

struct Product {
  std::int64_t rows;
  std::int64_t cols;
  bool norm;
  VectorEpilogue epilogue;
};

std::string describe(const Product& p) {
  return std::to_string(p.rows) + " x " + std::to_string(p.cols) + (p.norm ? ", norm" : "") +
         ", epilogue " + std::to_string(static_cast<int>(p.epilogue));
}

/// Every output of one product against float64 sums, and a second launch's bits against the
/// first's.
template <class Element>
void check(const Product& p, bool overlap, std::uint64_t seed) {
  SCOPED_TRACE(describe(p));
  Random random(seed);
  const auto rows = static_cast<std::size_t>(p.rows);
  const auto cols = static_cast<std::size_t>(p.cols);
  const std::vector<Element> matrix = rounded_to<Element>(random_floats(random, rows * cols));
  const std::vector<float> x = random_floats(random, cols);
  const std::vector<float> norm = random_floats(random, cols);
  const bool gated = p.epilogue == VectorEpilogue::kGatedSilu;
  const std::size_t outputs = gated ? rows / 2 : rows;
  const bool adds = p.epilogue == VectorEpilogue::kAdd;
  const std::vector<float> before =
      adds ? random_floats(random, outputs)
           : std::vector<float>(outputs, std::numeric_limits<float>::quiet_NaN());

  const MatrixVectorPlan<Element> plan(overlap);
  const Buffer<Element, cuda> device_matrix{std::span<const Element>(matrix)};
  const Buffer<float, cuda> device_x{std::span<const float>(x)};
  const Buffer<float, cuda> device_norm{std::span<const float>(norm)};
  Buffer<float, cuda> y(outputs);
  Buffer<TokenCandidate, cuda> candidates(static_cast<std::size_t>(plan.blocks()));
  MatrixVectorTask<Element> task;
  task.matrix = device_matrix.data();
  task.rows = p.rows;
  task.cols = p.cols;
  task.x = device_x.data();
  task.norm = p.norm ? device_norm.data() : nullptr;
  task.norm_eps = 1e-5F;
  task.y = y.data();
  task.candidates = candidates.data();

  std::vector<float> found[2];
  for (std::vector<float>& result : found) {
    y.upload(before);
    plan.launch(task, p.epilogue, nullptr);
    result = y.download();
  }
  for (std::size_t i = 0; i < outputs; ++i)
    ASSERT_TRUE(found[0][i] == found[1][i]) << "other bits the second time, row " << i;

  double square = 0;
  for (const float v : x) square += static_cast<double>(v) * static_cast<double>(v);
  const double scale = p.norm ? 1 / std::sqrt(square / static_cast<double>(cols) + 1e-5) : 1;
  std::vector<double> exact(rows);
  std::vector<double> bound(rows);
  // A lane adds cols / 64 terms to each of two sums, then five more additions, 16 warps', the norm.
  const double roundings = static_cast<double>(cols) / 64 + 32;
  for (std::size_t r = 0; r < rows; ++r) {
    double magnitude = 0;
    for (std::size_t c = 0; c < cols; ++c) {
      const double term = static_cast<double>(static_cast<float>(matrix[r * cols + c])) *
                          static_cast<double>(x[c]) *
                          (p.norm ? scale * static_cast<double>(norm[c]) : 1.0);
      exact[r] += term;
      magnitude += std::abs(term);
    }
    bound[r] = roundings * 0x1p-24 * magnitude + 1e-30;
  }
  TokenCandidate best{-std::numeric_limits<float>::infinity(), 0};
  for (std::size_t i = 0; i < outputs; ++i) {
    if (gated) {
      const double gate = exact[2 * i];
      const double up = exact[2 * i + 1];
      const double expected = gate / (1 + std::exp(-gate)) * up;
      // silu's slope is below 1.1; __expf and the division err by 2^-20 together.
      const double allowed = 1.1 * std::abs(up) * bound[2 * i] + std::abs(gate) * bound[2 * i + 1] +
                             0x1p-20 * (1 + std::abs(gate)) * std::abs(expected) + 1e-30;
      ASSERT_NEAR(static_cast<double>(found[0][i]), expected, allowed) << "row " << i;
    } else {
      const double expected = exact[i] + (adds ? static_cast<double>(before[i]) : 0);
      ASSERT_NEAR(static_cast<double>(found[0][i]), expected,
                  bound[i] + 0x1p-23 * std::abs(expected))
          << "row " << i;
    }
    if (found[0][i] > best.score) best = {found[0][i], static_cast<std::int32_t>(i)};
  }
  if (p.epilogue == VectorEpilogue::kChoose) {
    TokenCandidate chosen{-std::numeric_limits<float>::infinity(), 0};
    for (const TokenCandidate& c : candidates.download())
      if (c.score > chosen.score) chosen = c;
    EXPECT_EQ(chosen.token, best.token);
    EXPECT_EQ(chosen.score, best.score);
  }
}

TEST(MatrixVector, RandomShapesAgainstFloat64) {
  SKIP_WITHOUT_DEVICE();
  Random random(5);
  const std::int64_t rows[] = {2, 4, 6, 64, 130, 132, 134, 264, 576, 1000, 1538, 4098};
  const std::int64_t cols[] = {8, 16, 64, 248, 256, 264, 576, 1000, 1536, 4096, 4104, 11008, 14336};
  using enum VectorEpilogue;
  for (int i = 0; i < 60; ++i) {
    Product p{rows[random.below(std::size(rows))], cols[random.below(std::size(cols))],
              random.next() % 2 == 0, static_cast<VectorEpilogue>(i % 4)};
    if (p.epilogue != kGatedSilu && random.next() % 2 == 0) --p.rows;
    if (i % 8 < 6)
      check<bf16>(p, i % 3 == 0, 100 + static_cast<std::uint64_t>(i));
    else
      check<f16>(p, i % 3 == 0, 100 + static_cast<std::uint64_t>(i));
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(MatrixVector, RefusesWhatDoesNotFit) {
  SKIP_WITHOUT_DEVICE();
  const MatrixVectorPlan<bf16> plan(false);
  MatrixVectorTask<bf16> task;
  task.rows = 3;
  task.cols = 12;
  EXPECT_THROW(plan.launch(task, VectorEpilogue::kStore, nullptr), Error);
  task.cols = 16;
  EXPECT_THROW(plan.launch(task, VectorEpilogue::kGatedSilu, nullptr), Error);
  task.cols = 1 << 20;
  EXPECT_THROW(plan.launch(task, VectorEpilogue::kStore, nullptr), Error);
}

/// A temperature draws from the softmax: frequencies over 40,000 sequences with the same logits.
TEST(TokenChoice, DrawsFromTheSoftmax) {
  SKIP_WITHOUT_DEVICE();
  constexpr std::size_t kRows = 40000;
  constexpr std::size_t kVocab = 12;
  Random random(9);
  const std::vector<float> one = random_floats(random, kVocab);
  std::vector<float> logits;
  for (std::size_t r = 0; r < kRows; ++r) logits.insert(logits.end(), one.begin(), one.end());
  const Buffer<float, cuda> device_logits{std::span<const float>(logits)};
  Buffer<TokenCandidate, cuda> candidates(kRows);
  const Buffer<std::int64_t, cuda> totals(kRows);
  for (const float temperature : {0.7F, 1.5F}) {
    const detail::TokenChoiceParams p{.logits = device_logits.data(),
                                      .candidates = candidates.data(),
                                      .totals = totals.data(),
                                      .tokens = nullptr,
                                      .history = nullptr,
                                      .embedding = nullptr,
                                      .hidden = nullptr,
                                      .history_size = 0,
                                      .sequence = 0,
                                      .seed = 3,
                                      .temperature = temperature,
                                      .parts = 1,
                                      .vocab_size = kVocab,
                                      .hidden_size = 0};
    detail::launch_kernel("candidates", detail::candidates_kernel<64>, dim3(1, kRows), 64, nullptr,
                          false, p);
    std::vector<double> count(kVocab);
    for (const TokenCandidate& c : candidates.download())
      count.at(static_cast<std::size_t>(c.token)) += 1;
    double sum = 0;
    for (const float logit : one) sum += std::exp(static_cast<double>(logit / temperature));
    for (std::size_t i = 0; i < kVocab; ++i) {
      const double share = std::exp(static_cast<double>(one[i] / temperature)) / sum;
      const double deviation = std::sqrt(share * (1 - share) * kRows);
      EXPECT_NEAR(count[i], share * kRows, 5 * deviation) << "token " << i;
    }
  }
}

}  // namespace SLUICE_TEST_UNIT
