// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/backend/cuda/matrix_columns.cuh>
#include <sluice/backend/cuda/memory.cuh>

#include <sluice/core/random.hpp>

#include "backend/cuda/device_test.hpp"

namespace {

using namespace sluice;
using sluice_test::random_floats;
using sluice_test::rounded_to;

constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

struct Product {
  std::int64_t rows;
  std::int64_t cols;
  int count;
  bool norm;
  VectorEpilogue epilogue;
  std::int64_t x_padding = 0;  // floats between vectors, a multiple of 4
  std::int64_t y_padding = 0;
  double scale = 1;  // of the first vector; every next is 30 times as large
  int binades = 0;   // that numbers of a vector are spread over
  int multiprocessors = 0;
  bool alone = false;
};

std::string describe(const Product& p) {
  return std::to_string(p.rows) + " x " + std::to_string(p.cols) + ", " + std::to_string(p.count) +
         " vectors" + (p.norm ? ", norm" : "") + ", epilogue " +
         std::to_string(static_cast<int>(p.epilogue)) + ", scale " + std::to_string(p.scale);
}

/// Every output of one product against float64 sums, what lies between outputs, and a second
/// launch's bits against the first's. What the product must not read is not a number.
template <class Element>
void check(const Product& p, bool overlap, std::uint64_t seed) {
  SCOPED_TRACE(describe(p));
  Random random(seed);
  const auto rows = static_cast<std::size_t>(p.rows);
  const auto cols = static_cast<std::size_t>(p.cols);
  const auto vectors = static_cast<std::size_t>(p.count);
  const bool gated = p.epilogue == VectorEpilogue::kGatedSilu;
  const bool adds = p.epilogue == VectorEpilogue::kAdd;
  const std::size_t outputs = gated ? rows / 2 : rows;
  const std::size_t x_stride = cols + static_cast<std::size_t>(p.x_padding);
  const std::size_t y_stride = outputs + static_cast<std::size_t>(p.y_padding);
  std::vector<Element> matrix = rounded_to<Element>(random_floats(random, rows * cols));
  matrix.insert(matrix.end(), 64, Element(kPoison));
  std::vector<float> x((vectors + 1) * x_stride, kPoison);
  std::vector<float> before((vectors + 1) * y_stride, kPoison);
  const std::vector<float> norm = random_floats(random, cols);
  double scale = p.scale;
  for (std::size_t v = 0; v < vectors; ++v, scale *= 30) {
    for (std::size_t c = 0; c < cols; ++c) {
      const int down =
          p.binades > 0 ? static_cast<int>(random.below(static_cast<std::uint64_t>(p.binades))) : 0;
      x[v * x_stride + c] = static_cast<float>(std::ldexp(scale * random.normal(), -down));
    }
    for (std::size_t i = 0; adds && i < outputs; ++i)
      before[v * y_stride + i] = static_cast<float>(scale * random.normal());
  }

  const MatrixColumnsPlan<Element> plan(overlap, p.multiprocessors);
  const Buffer<Element, cuda> device_matrix{std::span<const Element>(matrix)};
  const Buffer<float, cuda> device_x{std::span<const float>(x)};
  const Buffer<float, cuda> device_norm{std::span<const float>(norm)};
  Buffer<float, cuda> y(before.size());
  MatrixColumnsTask<Element> task;
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
    plan.launch(task, p.epilogue, nullptr, p.alone);
    result = y.download();
  }
  for (std::size_t i = 0; i < before.size(); ++i) {
    if (i / y_stride < vectors && i % y_stride < outputs)
      ASSERT_TRUE(found[0][i] == found[1][i]) << "other bits the second time, " << i;
    else
      ASSERT_TRUE(std::isnan(found[0][i])) << "written beside the outputs, " << i;
  }

  // high + low keep x but for 2^-18 (bf16), 2^-24 (f16), of f16 also at least 2^-39 of the largest;
  // the product with the norm is rounded first.
  constexpr bool kBrain = std::is_same_v<Element, bf16>;
  const double split = (kBrain ? 0x1p-18 : 0x1p-24) + 0x1p-24;
  // A warp adds up to 16 products of 16 columns, in two halves each that are cut at 2^-23, then 8
  // warps', 4 blocks' and 7 passes' sums and the norm are rounded.
  const double roundings = 2 * 2 * 16 + 8 + 4 * 7 + 6;
  std::vector<double> exact(rows);
  std::vector<double> bound(rows);
  for (std::size_t v = 0; v < vectors; ++v) {
    std::vector<double> input(x.begin() + static_cast<std::ptrdiff_t>(v * x_stride),
                              x.begin() + static_cast<std::ptrdiff_t>(v * x_stride + cols));
    double square = 0;
    for (const double w : input) square += w * w;
    double largest = 0;
    for (std::size_t c = 0; c < cols; ++c) {
      if (p.norm)
        input[c] *= static_cast<double>(norm[c]) /
                    std::sqrt(square / static_cast<double>(cols) + static_cast<double>(1e-5F));
      largest = std::max(largest, std::abs(input[c]));
    }
    for (std::size_t r = 0; r < rows; ++r) {
      double sum = 0;
      double magnitude = 0;
      double weights = 0;
      for (std::size_t c = 0; c < cols; ++c) {
        const auto w = static_cast<double>(static_cast<float>(matrix[r * cols + c]));
        sum += w * input[c];
        magnitude += std::abs(w * input[c]);
        weights += std::abs(w);
      }
      exact[r] = sum;
      bound[r] = (split + roundings * 0x1p-24) * magnitude +
                 (kBrain ? 0 : 0x1p-39 * largest * weights) + 1e-30;
    }
    for (std::size_t i = 0; i < outputs; ++i) {
      const auto value = static_cast<double>(found[0][v * y_stride + i]);
      if (gated) {
        const double gate = exact[2 * i];
        const double up = exact[2 * i + 1];
        const double expected = gate / (1 + std::exp(-gate)) * up;
        // silu's slope is below 1.1; __expf and the division err by 2^-20 together.
        const double allowed = 1.1 * bound[2 * i] * (std::abs(up) + bound[2 * i + 1]) +
                               std::abs(gate) * bound[2 * i + 1] +
                               0x1p-20 * (1 + std::abs(gate)) * std::abs(expected) + 1e-30;
        ASSERT_NEAR(value, expected, allowed) << "vector " << v << ", row " << i;
      } else {
        const double expected =
            exact[i] + (adds ? static_cast<double>(before[v * y_stride + i]) : 0);
        ASSERT_NEAR(value, expected, bound[i] + 0x1p-23 * std::abs(expected))
            << "vector " << v << ", row " << i;
      }
    }
  }
}

constexpr VectorEpilogue kEpilogues[] = {VectorEpilogue::kStore, VectorEpilogue::kAdd,
                                         VectorEpilogue::kGatedSilu};

/// Few numbers: for the sanitizer's tools, too.
TEST(MatrixColumns, SmallShapesOfEveryEpilogueAndCount) {
  SKIP_WITHOUT_DEVICE();
  int i = 0;
  for (const VectorEpilogue epilogue : kEpilogues)
    for (int count = 1; count <= 8; ++count, ++i) {
      const std::int64_t rows = epilogue == VectorEpilogue::kGatedSilu ? 34 : 35;
      const std::int64_t cols = i % 3 == 0 ? 2120 : 200;
      check<bf16>({rows, cols, count, i % 2 == 0, epilogue, 4 * (i % 2), i % 3}, i % 2 == 1,
                  static_cast<std::uint64_t>(i));
      check<f16>({rows, cols, count, i % 2 == 1, epilogue, 4 * (i % 3), i % 2}, i % 2 == 0,
                 static_cast<std::uint64_t>(i));
      if (testing::Test::HasFatalFailure()) return;
    }
}

TEST(MatrixColumns, RandomShapesAgainstFloat64) {
  SKIP_WITHOUT_DEVICE();
  Random random(6);
  const std::int64_t rows[] = {2, 4, 6, 16, 64, 130, 132, 134, 264, 576, 1000, 1538};
  const std::int64_t cols[] = {8,    16,   64,   248,  256,  512,   576,   1000, 1024,
                               1536, 2048, 4096, 4104, 8192, 11008, 14336, 16440};
  for (int i = 0; i < 60; ++i) {
    Product p{rows[random.below(std::size(rows))],
              cols[random.below(std::size(cols))],
              1 + static_cast<int>(random.below(8)),
              random.next() % 2 == 0,
              kEpilogues[i % 3],
              4 * static_cast<std::int64_t>(random.below(3)),
              static_cast<std::int64_t>(random.below(3))};
    if (p.epilogue != VectorEpilogue::kGatedSilu && random.next() % 2 == 0) --p.rows;
    if (i % 5 == 0) p.multiprocessors = 1 + static_cast<int>(random.below(140));
    p.alone = i % 7 == 0;
    if (i % 8 < 5)
      check<bf16>(p, i % 3 == 0, 100 + static_cast<std::uint64_t>(i));
    else
      check<f16>(p, i % 3 == 0, 100 + static_cast<std::uint64_t>(i));
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(MatrixColumns, ManyRows) {
  SKIP_WITHOUT_DEVICE();
  // Sums of 40,001 rows and 8 passes do not fit beside each other in one launch on 4 blocks.
  check<bf16>({40001, 1040, 3, true, VectorEpilogue::kStore}, false, 1);
  check<bf16>({40001, 1040, 3, false, VectorEpilogue::kAdd, 0, 0, 1, 0, 4}, true, 2);
  check<f16>({40002, 1040, 2, false, VectorEpilogue::kGatedSilu, 0, 0, 1, 0, 4}, true, 3);
}

TEST(MatrixColumns, LargeAndTinyInputs) {
  SKIP_WITHOUT_DEVICE();
  int i = 0;
  for (const double scale : {1e-30, 1e-12, 1e-6, 1e6, 1e20}) {
    for (const VectorEpilogue epilogue : {VectorEpilogue::kStore, VectorEpilogue::kAdd}) {
      // Squares of larger numbers are not float32 numbers.
      const bool norm = scale < 1e7 && i % 2 == 0;
      check<bf16>({70, 1096, 5, norm, epilogue, 0, 0, scale, i % 3 * 16}, false,
                  static_cast<std::uint64_t>(i));
      check<f16>({70, 1096, 6, norm, epilogue, 0, 0, scale, i % 3 * 16}, false,
                 static_cast<std::uint64_t>(i));
      if (testing::Test::HasFatalFailure()) return;
      ++i;
    }
  }
}

/// A vector's results do not depend on what stands beside it.
TEST(MatrixColumns, VectorsDoNotMeet) {
  SKIP_WITHOUT_DEVICE();
  Random random(11);
  constexpr std::int64_t kRows = 100;
  constexpr std::int64_t kCols = 1000;
  const Buffer<bf16, cuda> matrix{
      std::span<const bf16>(rounded_to<bf16>(random_floats(random, kRows * kCols)))};
  std::vector<float> x = random_floats(random, 8 * kCols);
  const MatrixColumnsPlan<bf16> plan(false);
  Buffer<float, cuda> device_x(x.size());
  Buffer<float, cuda> y(8 * kRows);
  MatrixColumnsTask<bf16> task;
  task.matrix = matrix.data();
  task.rows = kRows;
  task.cols = kCols;
  task.x_stride = kCols;
  task.y = y.data();
  task.y_stride = kRows;
  const auto run = [&](std::size_t first, int count) {
    device_x.upload(x);
    task.x = device_x.data() + first * kCols;
    task.count = count;
    plan.launch(task, VectorEpilogue::kStore, nullptr);
    return y.download();
  };
  const std::vector<float> together = run(0, 8);
  for (std::size_t v = 0; v < 8; ++v) {
    const std::vector<float> one = run(v, 1);
    for (std::size_t r = 0; r < kRows; ++r)
      ASSERT_EQ(one[r], together[v * kRows + r]) << "vector " << v << ", row " << r;
  }
  std::fill(x.begin(), x.begin() + kCols, kPoison);
  const std::vector<float> beside = run(0, 8);
  for (std::size_t i = kRows; i < 8 * kRows; ++i) ASSERT_EQ(beside[i], together[i]) << i;
  for (std::size_t i = 0; i < kRows; ++i) ASSERT_TRUE(std::isnan(beside[i])) << i;
}

TEST(MatrixColumns, RefusesWhatDoesNotFit) {
  SKIP_WITHOUT_DEVICE();
  const MatrixColumnsPlan<bf16> plan(false);
  MatrixColumnsTask<bf16> good;
  good.rows = 3;
  good.cols = 16;
  good.count = 2;
  good.x_stride = 16;
  good.y_stride = 3;
  const auto refused = [&](auto&& change, VectorEpilogue epilogue = VectorEpilogue::kStore) {
    MatrixColumnsTask<bf16> task = good;
    change(task);
    try {
      plan.launch(task, epilogue, nullptr);
    } catch (const Error& error) {
      return error.code() == ErrorCode::kShape;
    }
    return false;
  };
  EXPECT_TRUE(refused([](auto& task) { task.cols = 12; }));
  EXPECT_TRUE(refused([](auto& task) { task.cols = 0; }));
  EXPECT_TRUE(refused([](auto& task) { task.cols = std::int64_t{1} << 21; }));
  EXPECT_TRUE(refused([](auto& task) { task.rows = 0; }));
  EXPECT_TRUE(refused([](auto& task) { task.rows = std::int64_t{1} << 31; }));
  EXPECT_TRUE(refused([](auto& task) { task.count = 0; }));
  EXPECT_TRUE(refused([](auto& task) { task.count = 9; }));
  EXPECT_TRUE(refused([](auto& task) { task.x_stride = 18; }));
  EXPECT_TRUE(refused([](auto&) {}, VectorEpilogue::kGatedSilu));
  EXPECT_TRUE(refused([](auto&) {}, VectorEpilogue::kChoose));
}

}  // namespace
