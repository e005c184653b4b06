// SPDX-License-Identifier: MIT
#include "sluice/core/view.hpp"

#include <numeric>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

std::vector<int> counted(std::size_t size) {
  std::vector<int> values(size);
  std::iota(values.begin(), values.end(), 0);
  return values;
}

TEST(MatrixView, RowsFollowTheStride) {
  auto values = counted(100);
  const MatrixView<int> dense(values.data(), 5, 7);
  const MatrixView<int> strided(values.data() + 3, 5, 7, 12);
  for (std::int64_t r = 0; r < 5; ++r)
    for (std::int64_t c = 0; c < 7; ++c) {
      EXPECT_EQ(dense.row(r)[c], r * 7 + c);
      EXPECT_EQ(strided.row(r)[c], 3 + r * 12 + c);
    }
  dense.row(2)[1] = -1;
  EXPECT_EQ(values[15], -1);
}

TEST(MatrixView, MiddleRowsKeepTheStride) {
  auto values = counted(100);
  const MatrixView<int> view(values.data(), 6, 4, 10);
  const auto middle = view.middle_rows(2, 3);
  EXPECT_EQ(middle.rows, 3);
  EXPECT_EQ(middle.cols, 4);
  EXPECT_EQ(middle.stride, 10);
  EXPECT_EQ(middle.row(1)[3], 33);
  EXPECT_EQ(view.middle_rows(6, 0).rows, 0);
}

TEST(HeadsView, HeadsOfATokenAreConsecutive) {
  auto values = counted(200);
  const HeadsView<int> dense(values.data(), 4, 3, 5);
  const HeadsView<int> strided(values.data(), 4, 3, 5, 40);
  EXPECT_EQ(dense.token_stride, 15);
  for (std::int64_t t = 0; t < 4; ++t)
    for (std::int64_t h = 0; h < 3; ++h) {
      EXPECT_EQ(*dense.head(t, h), t * 15 + h * 5);
      EXPECT_EQ(*strided.head(t, h), t * 40 + h * 5);
    }
}

TEST(Views, MutableConvertsToConstOnly) {
  auto values = counted(20);
  const MatrixView<int> matrix(values.data(), 2, 5, 8);
  const MatrixView<const int> const_matrix = matrix;
  EXPECT_EQ(const_matrix.row(1), values.data() + 8);
  const HeadsView<int> heads(values.data(), 2, 2, 3, 9);
  const HeadsView<const int> const_heads = heads;
  EXPECT_EQ(const_heads.head(1, 1), values.data() + 12);
  static_assert(!std::is_convertible_v<MatrixView<const int>, MatrixView<int>>);
  static_assert(!std::is_convertible_v<HeadsView<const int>, HeadsView<int>>);
  static_assert(!std::is_convertible_v<MatrixView<int>, MatrixView<const long>>);
}

TEST(Views, DefaultIsEmpty) {
  const MatrixView<float> matrix;
  const HeadsView<float> heads;
  EXPECT_EQ(matrix.data, nullptr);
  EXPECT_EQ(matrix.rows, 0);
  EXPECT_EQ(heads.data, nullptr);
  EXPECT_EQ(heads.tokens, 0);
}

#if SLUICE_DEBUG_ASSERTS
TEST(ViewsDeathTest, IndicesOutOfRangeAreAsserted) {
  int value = 0;
  const MatrixView<int> matrix(&value, 1, 1);
  const HeadsView<int> heads(&value, 1, 1, 1);
  EXPECT_DEATH(matrix.row(1), "");
  EXPECT_DEATH(matrix.row(-1), "");
  EXPECT_DEATH(matrix.middle_rows(0, 2), "");
  EXPECT_DEATH(heads.head(0, 1), "");
  EXPECT_DEATH(heads.head(1, 0), "");
}
#endif

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
