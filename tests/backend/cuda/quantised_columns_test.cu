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

#include <sluice/backend/cuda/quantised_columns.cuh>

#include <sluice/core/random.hpp>

#include "backend/cuda/device_test.hpp"
#include "backend/cuda/quantised_sample.hpp"

namespace {

using namespace sluice;
using sluice_test::QuantisedSample;
using sluice_test::random_floats;
using sluice_test::random_quantised;

constexpr ElementType kTypes[] = {ElementType::kQ8_0, ElementType::kQ6_K, ElementType::kQ4_0,
                                  ElementType::kQ4_1, ElementType::kQ4_K};
constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

struct Product {
  ElementType type;
  std::int64_t rows;
  std::int64_t cols;
  int count;
  bool norm;
  VectorEpilogue epilogue;
  /// Inputs, norm included, have at most 11 significant bits: nothing is rounded in the product's
  /// vectors, so that one wrong weight of many shows.
  bool short_inputs = false;
  int binades = 0;  ///< x is multiplied by powers of two from 2^-binades to 2^binades
};

std::string describe(const Product& p) {
  return std::string(to_string(p.type)) + ", " + std::to_string(p.rows) + " x " +
         std::to_string(p.cols) + ", count " + std::to_string(p.count) + (p.norm ? ", norm" : "") +
         (p.short_inputs ? ", short" : "") + ", epilogue " +
         std::to_string(static_cast<int>(p.epilogue)) + ", binades " + std::to_string(p.binades);
}

/// x with `bits` significant bits.
float shortened(float x, int bits) {
  int exponent = 0;
  const float mantissa = std::frexp(x, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(mantissa, bits)), exponent - bits);
}

/// Every output of one product against float64 sums, a second launch's bits against the first's,
/// and what lies between outputs against what was there.
void check(const Product& p, bool overlap, std::uint64_t seed, bool alone = false) {
  SCOPED_TRACE(describe(p));
  Random random(seed);
  const auto rows = static_cast<std::size_t>(p.rows);
  const auto cols = static_cast<std::size_t>(p.cols);
  const auto count = static_cast<std::size_t>(p.count);
  const QuantisedSample matrix = random_quantised(p.type, p.rows, p.cols, seed + 1000);
  const std::size_t x_stride = cols + 4 * random.below(3);
  std::vector<float> x = random_floats(random, count * x_stride);
  if (p.binades > 0)
    for (float& v : x)
      v = std::ldexp(v,
                     static_cast<int>(random.below(static_cast<std::uint64_t>(2 * p.binades + 1))) -
                         p.binades);
  std::vector<float> norm = random_floats(random, cols);
  if (p.short_inputs) {
    for (float& v : x) v = shortened(v, 8);
    for (float& v : norm) v = shortened(v, 3);
  }
  for (std::size_t n = 0; n < count; ++n)  // vectors of different sizes; gaps are not read
    for (std::size_t c = 0; c < x_stride; ++c)
      x[n * x_stride + c] =
          c < cols ? std::ldexp(x[n * x_stride + c], static_cast<int>(n % 4) - 2) : kPoison;
  const bool gated = p.epilogue == VectorEpilogue::kGatedSilu;
  const bool adds = p.epilogue == VectorEpilogue::kAdd;
  const std::size_t outputs = gated ? rows / 2 : rows;
  const std::size_t y_stride = outputs + random.below(5);
  std::vector<float> before(count * y_stride + 1, kPoison);
  if (adds)
    for (std::size_t n = 0; n < count; ++n)
      for (std::size_t i = 0; i < outputs; ++i)
        before[n * y_stride + i] = static_cast<float>(random.normal());

  const QuantisedColumnsPlan plan(overlap);
  const Buffer<std::uint8_t, cuda> device_matrix{std::span<const std::uint8_t>(matrix.packed)};
  const Buffer<float, cuda> device_x{std::span<const float>(x)};
  const Buffer<float, cuda> device_norm{std::span<const float>(norm)};
  Buffer<float, cuda> y(before.size());
  QuantisedColumnsTask task;
  task.type = p.type;
  task.matrix = device_matrix.data();
  task.rows = p.rows;
  task.cols = p.cols;
  task.count = p.count;
  task.x = device_x.data();
  task.x_stride = static_cast<std::int64_t>(x_stride);
  task.norm = p.norm ? device_norm.data() : nullptr;
  task.norm_eps = 1e-5F;
  task.y = y.data();
  task.y_stride = static_cast<std::int64_t>(y_stride);

  std::vector<float> found[2];
  for (std::vector<float>& result : found) {
    y.upload(before);
    plan.launch(task, p.epilogue, nullptr, alone);
    result = y.download();
  }
  for (std::size_t i = 0; i < before.size(); ++i) {
    if (i / y_stride < count && i % y_stride < outputs)
      ASSERT_TRUE(found[0][i] == found[1][i]) << "other bits the second time, output " << i;
    else
      ASSERT_TRUE(std::isnan(found[0][i])) << "written between outputs, at " << i;
  }

  // Sums are float32: a tensor core aligns the 16 products of an instruction with what they are
  // added to and may cut off what is below: 17 x 2^-23 of a block's sum, twice. Then an addition
  // for each block of a span, the parts of warps and of a cluster's blocks, the norm.
  const double roundings = 2 + 2 * 34 + static_cast<double>(cols) / 16 / 8 + 40;
  for (std::size_t n = 0; n < count; ++n) {
    double square = 0;
    for (std::size_t c = 0; c < cols; ++c) {
      const auto v = static_cast<double>(x[n * x_stride + c]);
      square += v * v;
    }
    const double scale = p.norm ? 1 / std::sqrt(square / static_cast<double>(cols) + 1e-5) : 1;
    std::vector<double> inputs(cols);
    std::vector<double> errors(cols);
    for (std::size_t c = 0; c < cols; ++c)
      inputs[c] = static_cast<double>(x[n * x_stride + c]) *
                  (p.norm ? scale * static_cast<double>(norm[c]) : 1.0);
    for (std::size_t first = 0; first < cols; first += 128) {
      double top = 0;
      const std::size_t end = std::min(first + 128, cols);
      for (std::size_t c = first; c < end; ++c) top = std::max(top, std::abs(inputs[c]));
      // f16 has 11 bits; what is far below the largest of 128 columns is off by 2^-35 of that.
      for (std::size_t c = first; c < end; ++c)
        errors[c] = (p.short_inputs ? 0 : 0x1p-11 * std::abs(inputs[c])) + 0x1p-35 * top;
    }
    std::vector<double> exact(rows);
    std::vector<double> bound(rows);
    for (std::size_t r = 0; r < rows; ++r) {
      double magnitude = 0;
      for (std::size_t c = 0; c < cols; ++c) {
        const auto weight = static_cast<double>(matrix.values[r * cols + c]);
        exact[r] += weight * inputs[c];
        magnitude += static_cast<double>(matrix.magnitudes[r * cols + c]) * std::abs(inputs[c]);
        bound[r] += std::abs(weight) * errors[c];
      }
      bound[r] += roundings * 0x1p-24 * magnitude + 1e-30;
    }
    for (std::size_t i = 0; i < outputs; ++i) {
      const auto result = static_cast<double>(found[0][n * y_stride + i]);
      if (gated) {
        const double gate = exact[2 * i];
        const double up = exact[2 * i + 1];
        const double expected = gate / (1 + std::exp(-gate)) * up;
        // silu's slope is below 1.1; __expf and the division err by 2^-20 together.
        const double allowed = 1.1 * std::abs(up) * bound[2 * i] +
                               (std::abs(gate) + bound[2 * i]) * bound[2 * i + 1] +
                               0x1p-20 * (1 + std::abs(gate)) * std::abs(expected) + 1e-30;
        ASSERT_NEAR(result, expected, allowed) << "vector " << n << ", row " << i;
      } else {
        const double expected =
            exact[i] + (adds ? static_cast<double>(before[n * y_stride + i]) : 0);
        ASSERT_NEAR(result, expected, bound[i] + 0x1p-23 * std::abs(expected))
            << "vector " << n << ", row " << i;
      }
    }
  }
}

TEST(QuantisedColumns, RandomShapesAgainstFloat64) {
  SKIP_WITHOUT_DEVICE();
  Random random(6);
  const std::int64_t rows[] = {2, 4, 6, 8, 10, 16, 18, 64, 130, 576, 1000, 1058, 1538, 2114, 6400};
  const std::int64_t blocks[] = {1, 2, 3, 4, 5, 8, 18, 31, 43, 128, 344, 448};  // of 32 columns
  for (int i = 0; i < 120; ++i) {
    const ElementType type = kTypes[i % 5];
    Product p{type,
              rows[random.below(std::size(rows))],
              32 * blocks[random.below(std::size(blocks))],
              1 + i / 5 % 8,
              random.next() % 2 == 0,
              static_cast<VectorEpilogue>(random.below(3)),
              random.next() % 2 == 0};
    const std::int64_t block = block_shape(type).values;
    p.cols = (p.cols + block - 1) / block * block;
    if (p.rows * p.cols > 2500000) p.rows = 2 + 2 * static_cast<std::int64_t>(random.below(40));
    if (p.epilogue != VectorEpilogue::kGatedSilu && random.next() % 2 == 0) --p.rows;
    check(p, i % 3 == 0, 100 + static_cast<std::uint64_t>(i), i % 7 == 0);
    if (testing::Test::HasFatalFailure()) return;
  }
}

// Vectors that one block's shared memory does not hold.
TEST(QuantisedColumns, WideVectors) {
  SKIP_WITHOUT_DEVICE();
  using enum VectorEpilogue;
  std::uint64_t seed = 300;
  for (const ElementType type : kTypes)
    for (const std::int64_t cols : {8192, 11008, 14336, 18944, 32768})
      for (const VectorEpilogue epilogue : {kAdd, kGatedSilu}) {
        check({type, 36, cols, static_cast<int>(5 + seed % 4), epilogue == kGatedSilu, epilogue,
               true},
              true, ++seed);
        if (testing::Test::HasFatalFailure()) return;
      }
}

TEST(QuantisedColumns, InputsOfAnySize) {
  SKIP_WITHOUT_DEVICE();
  for (const ElementType type : kTypes)
    for (const int binades : {6, 20, 50})
      check({type, 67, 1024, 5, binades == 20, VectorEpilogue::kStore, false, binades}, true,
            static_cast<std::uint64_t>(400 + binades));
}

TEST(QuantisedColumns, AVectorDoesNotDependOnTheOthers) {
  SKIP_WITHOUT_DEVICE();
  const QuantisedColumnsPlan plan(true);
  constexpr std::int64_t kRows = 200;
  constexpr std::int64_t kCols = 4096;
  for (const ElementType type : kTypes) {
    Random random(8);
    const QuantisedSample matrix = random_quantised(type, kRows, kCols, 8);
    const Buffer<std::uint8_t, cuda> device_matrix{std::span<const std::uint8_t>(matrix.packed)};
    std::vector<float> x = random_floats(random, 8 * kCols);
    Buffer<float, cuda> device_x(x.size());
    Buffer<float, cuda> y(8 * kRows);
    QuantisedColumnsTask task;
    task.type = type;
    task.matrix = device_matrix.data();
    task.rows = kRows;
    task.cols = kCols;
    task.x = device_x.data();
    task.x_stride = kCols;
    task.y = y.data();
    task.y_stride = kRows;
    // Zeros, and what is no number, stay where they are.
    std::fill_n(x.begin() + kCols, kCols, 0.0F);
    x[2 * kCols + 100] = kPoison;
    x[3 * kCols + 100] = std::numeric_limits<float>::infinity();
    device_x.upload(x);
    task.count = 8;
    plan.launch(task, VectorEpilogue::kStore, nullptr);
    const std::vector<float> all = y.download();
    for (std::int64_t n = 0; n < 8; ++n) {
      task.x = device_x.data() + n * kCols;
      task.count = 1;
      plan.launch(task, VectorEpilogue::kStore, nullptr);
      const std::vector<float> one = y.download();
      for (std::int64_t r = 0; r < kRows; ++r) {
        const float found = all[static_cast<std::size_t>(n * kRows + r)];
        if (n == 2 || n == 3)
          ASSERT_FALSE(std::isfinite(found)) << to_string(type);
        else
          ASSERT_EQ(found, one[static_cast<std::size_t>(r)]) << to_string(type) << ", " << n;
        if (n == 1) ASSERT_EQ(found, 0) << to_string(type);
      }
    }
  }
}

TEST(QuantisedColumns, RefusesWhatDoesNotFit) {
  SKIP_WITHOUT_DEVICE();
  const QuantisedColumnsPlan plan(false);
  const auto refused = [&](const QuantisedColumnsTask& task, VectorEpilogue epilogue) {
    try {
      plan.launch(task, epilogue, nullptr);
    } catch (const Error& error) {
      return error.code() == ErrorCode::kShape;
    }
    return false;
  };
  using enum VectorEpilogue;
  QuantisedColumnsTask good;
  good.type = ElementType::kQ4_0;
  good.rows = 3;
  good.cols = 64;
  good.count = 2;
  QuantisedColumnsTask task = good;
  task.type = ElementType::kF32;
  EXPECT_TRUE(refused(task, kStore));
  EXPECT_FALSE(plan.fits(ElementType::kF32, 8, 64));
  task = good;
  task.cols = 48;
  EXPECT_TRUE(refused(task, kStore));
  task = good;
  EXPECT_TRUE(refused(task, kGatedSilu));
  EXPECT_TRUE(refused(task, kChoose));
  for (const int count : {0, 9}) {
    task.count = count;
    EXPECT_TRUE(refused(task, kStore)) << count;
  }
  task = good;
  task.x_stride = 66;
  EXPECT_TRUE(refused(task, kStore));
  task = good;
  task.cols = 1 << 20;
  EXPECT_TRUE(refused(task, kStore));
  EXPECT_FALSE(plan.fits(task.type, task.rows, task.cols));
  EXPECT_TRUE(plan.fits(task.type, 128256, 4096));
}

}  // namespace
