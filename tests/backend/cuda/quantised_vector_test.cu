// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/backend/cuda/quantised_vector.cuh>

#include <sluice/core/random.hpp>

#include "backend/cuda/device_test.hpp"
#include "backend/cuda/quantised_sample.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using sluice_test::QuantisedSample;
using sluice_test::random_floats;
using sluice_test::random_quantised;

constexpr ElementType kTypes[] = {ElementType::kQ8_0, ElementType::kQ6_K, ElementType::kQ4_0,
                                  ElementType::kQ4_1, ElementType::kQ4_K};

struct Product {
  ElementType type;
  std::int64_t rows;
  std::int64_t cols;
  bool norm;
  VectorEpilogue epilogue;
  int binades = 0;  ///< x is multiplied by powers of two from 2^-binades to 2^binades
};

std::string describe(const Product& p) {
  return std::string(to_string(p.type)) + ", " + std::to_string(p.rows) + " x " +
         std::to_string(p.cols) + (p.norm ? ", norm" : "") + ", epilogue " +
         std::to_string(static_cast<int>(p.epilogue)) + ", binades " + std::to_string(p.binades);
}

/// Every output of one product against float64 sums, and a second launch's bits against the
/// first's.
void check(const Product& p, bool overlap, std::uint64_t seed) {
  SCOPED_TRACE(describe(p));
  Random random(seed);
  const auto rows = static_cast<std::size_t>(p.rows);
  const auto cols = static_cast<std::size_t>(p.cols);
  const QuantisedSample matrix = random_quantised(p.type, p.rows, p.cols, seed + 1000);
  std::vector<float> x = random_floats(random, cols);
  if (p.binades > 0)
    for (float& v : x)
      v = std::ldexp(v,
                     static_cast<int>(random.below(static_cast<std::uint64_t>(2 * p.binades + 1))) -
                         p.binades);
  const std::vector<float> norm = random_floats(random, cols);
  const bool gated = p.epilogue == VectorEpilogue::kGatedSilu;
  const std::size_t outputs = gated ? rows / 2 : rows;
  const bool adds = p.epilogue == VectorEpilogue::kAdd;
  const std::vector<float> before =
      adds ? random_floats(random, outputs)
           : std::vector<float>(outputs, std::numeric_limits<float>::quiet_NaN());

  const QuantisedVectorPlan plan(overlap);
  const Buffer<std::uint8_t, cuda> device_matrix{std::span<const std::uint8_t>(matrix.packed)};
  const Buffer<float, cuda> device_x{std::span<const float>(x)};
  const Buffer<float, cuda> device_norm{std::span<const float>(norm)};
  Buffer<float, cuda> y(outputs);
  Buffer<TokenCandidate, cuda> candidates(static_cast<std::size_t>(plan.blocks()));
  QuantisedVectorTask task;
  task.type = p.type;
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
  // x is off by 2^-23 of itself; a tensor core aligns the 16 products of an instruction with what
  // they are added to and may cut off what is below: 17 x 2^-23 of a block's sum, twice. Then an
  // addition for each block of a span, the warps' parts, the norm.
  // Q4_0's levels are multiplied from 0 on and 8 times x's sum is taken away, terms some four times
  // as large: the bound makes no room for that. Blocks do not all err the same way.
  const double roundings = 2 + 2 * 34 + static_cast<double>(cols) / 16 / 8 + 32;
  // What is far below a chunk's largest x is off by 2^-39 of that.
  const auto chunk = static_cast<std::size_t>(quantised_layout(p.type).chunk_cols);
  std::vector<double> floor_of(cols);
  for (std::size_t c = 0; c < cols; ++c) {
    const std::size_t first = c / chunk * chunk;
    double top = 0;
    for (std::size_t i = first; i < std::min(first + chunk, cols); ++i)
      top = std::max(top, std::abs(static_cast<double>(x[i]) *
                                   (p.norm ? scale * static_cast<double>(norm[i]) : 1.0)));
    floor_of[c] = top * 0x1p-39;
  }
  for (std::size_t r = 0; r < rows; ++r) {
    double magnitude = 0;
    double below = 0;
    for (std::size_t c = 0; c < cols; ++c) {
      const double input =
          static_cast<double>(x[c]) * (p.norm ? scale * static_cast<double>(norm[c]) : 1.0);
      exact[r] += static_cast<double>(matrix.values[r * cols + c]) * input;
      magnitude += static_cast<double>(matrix.magnitudes[r * cols + c]) * std::abs(input);
      below += static_cast<double>(matrix.magnitudes[r * cols + c]) * floor_of[c];
    }
    bound[r] = roundings * 0x1p-24 * magnitude + below + 1e-30;
  }
  TokenCandidate best{-std::numeric_limits<float>::infinity(), 0};
  for (std::size_t i = 0; i < outputs; ++i) {
    if (gated) {
      const double gate = exact[2 * i];
      const double up = exact[2 * i + 1];
      const double expected = gate / (1 + std::exp(-gate)) * up;
      // silu's slope is below 1.1; __expf and the division err by 2^-20 together.
      const double allowed = 1.1 * std::abs(up) * bound[2 * i] +
                             (std::abs(gate) + bound[2 * i]) * bound[2 * i + 1] +
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

TEST(QuantisedVector, RandomShapesAgainstFloat64) {
  SKIP_WITHOUT_DEVICE();
  Random random(5);
  const std::int64_t rows[] = {2, 4, 6, 8, 10, 64, 130, 576, 1000, 1058, 1538, 2114};
  const std::int64_t blocks[] = {1, 2, 3, 4, 5, 8, 18, 31, 43, 128, 344, 448};  // of 32 columns
  using enum VectorEpilogue;
  for (int i = 0; i < 80; ++i) {
    const ElementType type = kTypes[i % 5];
    Product p{type, rows[random.below(std::size(rows))],
              32 * blocks[random.below(std::size(blocks))], random.next() % 2 == 0,
              static_cast<VectorEpilogue>(i / 5 % 4)};
    const std::int64_t block = block_shape(type).values;
    p.cols = (p.cols + block - 1) / block * block;
    if (p.rows * p.cols > 4000000) p.rows = 64;
    if (p.epilogue != kGatedSilu && random.next() % 2 == 0) --p.rows;
    check(p, i % 3 == 0, 100 + static_cast<std::uint64_t>(i));
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(QuantisedVector, InputsOfAnySize) {
  SKIP_WITHOUT_DEVICE();
  for (const ElementType type : kTypes)
    for (const int binades : {6, 20, 50})
      check({type, 67, 1024, binades == 20, VectorEpilogue::kStore, binades}, true,
            static_cast<std::uint64_t>(300 + binades));
}

TEST(QuantisedVector, ZerosAndWhatIsNoNumber) {
  SKIP_WITHOUT_DEVICE();
  const QuantisedVectorPlan plan(true);
  for (const ElementType type : kTypes) {
    const QuantisedSample matrix = random_quantised(type, 16, 256, 7);
    const Buffer<std::uint8_t, cuda> device_matrix{std::span<const std::uint8_t>(matrix.packed)};
    std::vector<float> x(256);
    Buffer<float, cuda> device_x(256);
    Buffer<float, cuda> y(16);
    QuantisedVectorTask task;
    task.type = type;
    task.matrix = device_matrix.data();
    task.rows = 16;
    task.cols = 256;
    task.x = device_x.data();
    task.y = y.data();
    plan.launch(task, VectorEpilogue::kStore, nullptr);
    for (const float v : y.download()) EXPECT_EQ(v, 0) << to_string(type);
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      x[100] = bad;
      device_x.upload(x);
      plan.launch(task, VectorEpilogue::kStore, nullptr);
      for (const float v : y.download()) EXPECT_FALSE(std::isfinite(v)) << to_string(type);
    }
  }
}

template <class Element>
void check_dequantised(ElementType type) {
  const std::int64_t block = block_shape(type).values;
  for (const std::int64_t rows : {1, 9, 64})
    for (const std::int64_t cols : {block, 3 * block, 5 * block}) {
      const QuantisedSample matrix = random_quantised(type, rows, cols, 11);
      const Buffer<std::uint8_t, cuda> packed{std::span<const std::uint8_t>(matrix.packed)};
      Buffer<Element, cuda> found(matrix.values.size());
      dequantise(type, packed.data(), rows, cols, found.data(), nullptr);
      const std::vector<Element> values = found.download();
      for (std::size_t i = 0; i < values.size(); ++i)
        ASSERT_EQ(static_cast<float>(values[i]), static_cast<float>(Element(matrix.values[i])))
            << to_string(type) << ", " << rows << " x " << cols << ", " << i;
    }
}

TEST(QuantisedVector, DequantisesAsTheHostDoes) {
  SKIP_WITHOUT_DEVICE();
  for (const ElementType type : kTypes) {
    check_dequantised<bf16>(type);
    check_dequantised<f16>(type);
  }
}

TEST(QuantisedVector, RefusesWhatDoesNotFit) {
  SKIP_WITHOUT_DEVICE();
  const QuantisedVectorPlan plan(false);
  QuantisedVectorTask task;
  task.rows = 3;
  task.cols = 64;
  EXPECT_THROW(plan.launch(task, VectorEpilogue::kStore, nullptr), Error);  // no type
  task.type = ElementType::kQ4_0;
  task.cols = 48;
  EXPECT_THROW(plan.launch(task, VectorEpilogue::kStore, nullptr), Error);
  task.cols = 64;
  EXPECT_THROW(plan.launch(task, VectorEpilogue::kGatedSilu, nullptr), Error);
  task.cols = 1 << 20;
  EXPECT_THROW(plan.launch(task, VectorEpilogue::kStore, nullptr), Error);
}

}  // namespace SLUICE_TEST_UNIT
