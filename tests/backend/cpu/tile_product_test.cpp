// SPDX-License-Identifier: MIT
#include "sluice/backend/cpu/tile_product.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "sluice/core/random.hpp"

namespace {

using sluice::Random;
using sluice::detail::tile_product;

constexpr std::int64_t kWidth = sluice::simd::kWidth;
constexpr float kGuard = 12345;

struct Matrix {
  std::int64_t rows;
  std::int64_t cols;
  std::int64_t stride;
  std::vector<float> data;

  Matrix(std::int64_t rows_, std::int64_t cols_, std::int64_t spare, Random& random)
      : rows(rows_),
        cols(cols_),
        stride(cols_ + spare),
        data(static_cast<std::size_t>(rows_ * stride + spare), kGuard) {
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < cols; ++c) at(r, c) = static_cast<float>(random.normal());
  }
  float& at(std::int64_t r, std::int64_t c) {
    return data[static_cast<std::size_t>(r * stride + c)];
  }
  float at(std::int64_t r, std::int64_t c) const {
    return data[static_cast<std::size_t>(r * stride + c)];
  }
};

template <bool kAccumulate>
void expect_product(std::int64_t rows, std::int64_t cols, std::int64_t depth, std::int64_t spare,
                    Random& random) {
  SCOPED_TRACE(testing::Message() << rows << " x " << cols << " x " << depth << ", spare " << spare
                                  << (kAccumulate ? ", +=" : ", ="));
  const Matrix a(rows, depth, spare, random);
  const Matrix b(depth, cols, spare, random);
  const Matrix before(rows, cols, spare, random);
  Matrix c = before;
  tile_product<kAccumulate>(a.data.data(), a.stride, b.data.data(), b.stride, c.data.data(),
                            c.stride, rows, cols, depth);
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < cols; ++j) {
      const double start = kAccumulate ? static_cast<double>(before.at(i, j)) : 0;
      double sum = start;
      double magnitude = std::abs(start);
      for (std::int64_t k = 0; k < depth; ++k) {
        const double term = static_cast<double>(a.at(i, k)) * static_cast<double>(b.at(k, j));
        sum += term;
        magnitude += std::abs(term);
      }
      // Each of depth steps rounds a product and a sum (one rounding where it is fused).
      const double bound = static_cast<double>(depth + 1) * 0x1p-24 * magnitude * 1.01;
      ASSERT_NEAR(static_cast<double>(c.at(i, j)), sum, bound) << i << ", " << j;
    }
    for (std::int64_t j = cols; j < c.stride; ++j) ASSERT_EQ(c.at(i, j), kGuard) << "spare columns";
  }
}

TEST(TileProduct, AgreesWithADoubleProductForAllEdgeSizes) {
  Random random(1);
  const std::int64_t depths[] = {0, 1, 2, 3, 7, 16, 33};
  for (std::int64_t rows = 0; rows <= 19; ++rows)
    for (std::int64_t vectors = 0; vectors <= 7; ++vectors)
      for (const std::int64_t depth : depths) {
        const std::int64_t spare = (rows + vectors + depth) % 3;
        expect_product<false>(rows, vectors * kWidth, depth, spare, random);
        expect_product<true>(rows, vectors * kWidth, depth, spare, random);
        if (HasFatalFailure()) return;
      }
}

TEST(TileProduct, AgreesWithADoubleProductForAttentionSizes) {
  Random random(2);
  expect_product<false>(192, 128, 64, 0, random);
  expect_product<false>(190, 112, 80, 0, random);
  expect_product<true>(192, 256, 128, 0, random);
  expect_product<true>(5, 96, 127, 0, random);
}

TEST(TileProduct, DepthZeroGivesZeroOrLeavesTheTarget) {
  std::vector<float> c(static_cast<std::size_t>(3 * kWidth), 7.0F);
  tile_product<true>(nullptr, 0, nullptr, 0, c.data(), kWidth, 3, kWidth, 0);
  EXPECT_EQ(c, std::vector<float>(c.size(), 7.0F));
  tile_product<false>(nullptr, 0, nullptr, 0, c.data(), kWidth, 3, kWidth, 0);
  EXPECT_EQ(c, std::vector<float>(c.size(), 0.0F));
}

TEST(TileProduct, AnElementDoesNotDependOnTheTileAroundIt) {
  // What lets attention cut its rows anywhere: the same bits, whichever block computed them.
  Random random(3);
  const std::int64_t rows = 21;
  const std::int64_t cols = 7 * kWidth;
  const std::int64_t depth = 37;
  const Matrix a(rows, depth, 0, random);
  const Matrix b(depth, cols, 0, random);
  std::vector<float> whole(static_cast<std::size_t>(rows * cols));
  tile_product<false>(a.data.data(), depth, b.data.data(), cols, whole.data(), cols, rows, cols,
                      depth);
  for (std::int64_t first = 0; first < rows; first += 4) {
    for (std::int64_t count = 1; count <= rows - first; ++count) {
      for (std::int64_t from = 0; from < cols; from += 3 * kWidth) {
        std::vector<float> part(static_cast<std::size_t>(count * cols));
        const std::int64_t width = std::min(2 * kWidth, cols - from);
        tile_product<false>(a.data.data() + first * depth, depth, b.data.data() + from, cols,
                            part.data(), width, count, width, depth);
        for (std::int64_t i = 0; i < count; ++i)
          for (std::int64_t j = 0; j < width; ++j)
            ASSERT_EQ(part[static_cast<std::size_t>(i * width + j)],
                      whole[static_cast<std::size_t>((first + i) * cols + from + j)]);
      }
    }
  }
}

}  // namespace
