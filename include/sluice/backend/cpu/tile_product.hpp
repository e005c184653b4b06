// SPDX-License-Identifier: MIT
/// Products of small row-major float tiles that stay in the cache: C += A B without packing,
/// blocked for registers. What attention tiles need; large weight products are in linear.hpp.
#pragma once

#include <cstdint>

#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/config.hpp"

namespace sluice::detail {

/// C block of `kRows` x (kVectors * simd::kWidth) columns += A [kRows, depth] * B [depth, .].
template <int kRows, int kVectors, bool kAccumulate>
[[gnu::always_inline]] inline void tile_block(const float* SLUICE_RESTRICT a, std::int64_t lda,
                                              const float* SLUICE_RESTRICT b, std::int64_t ldb,
                                              float* SLUICE_RESTRICT c, std::int64_t ldc,
                                              std::int64_t depth) {
  simd::VecF sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      sum[r][v] = kAccumulate ? simd::load(c + r * ldc + v * simd::kWidth) : simd::zero();
  for (std::int64_t k = 0; k < depth; ++k) {
    simd::VecF row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = simd::load(b + k * ldb + v * simd::kWidth);
    for (int r = 0; r < kRows; ++r) {
      const simd::VecF x = simd::broadcast(a[r * lda + k]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = simd::fma(x, row[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) simd::store(c + r * ldc + v * simd::kWidth, sum[r][v]);
}

/// C [rows, cols] = A [rows, depth] B [depth, cols], or += with kAccumulate. cols must be a
/// multiple of simd::kWidth; rows and depth are free. Leading dimensions are in elements. The order
/// of additions for an element of C does not depend on rows or cols.
template <bool kAccumulate>
inline void tile_product(const float* a, std::int64_t lda, const float* b, std::int64_t ldb,
                         float* c, std::int64_t ldc, std::int64_t rows, std::int64_t cols,
                         std::int64_t depth) {
  constexpr std::int64_t kWidth = simd::kWidth;
  // 8 x 3 accumulators, 3 columns of B and a broadcast fill 32 registers; 4 x 2 suit 16.
  constexpr int kRows = simd::kNumRegisters >= 32 ? 8 : 4;
  constexpr int kVectors = simd::kNumRegisters >= 32 ? 3 : 2;
  std::int64_t j = 0;
  const auto column = [&]<int kColumnVectors>(std::int64_t at) {
    const float* from = a;
    float* to = c + at;
    std::int64_t left = rows;
    for (; left >= kRows; left -= kRows, from += kRows * lda, to += kRows * ldc)
      tile_block<kRows, kColumnVectors, kAccumulate>(from, lda, b + at, ldb, to, ldc, depth);
    for (; left > 0; --left, from += lda, to += ldc)
      tile_block<1, kColumnVectors, kAccumulate>(from, lda, b + at, ldb, to, ldc, depth);
  };
  for (; j + kVectors * kWidth <= cols; j += kVectors * kWidth)
    column.template operator()<kVectors>(j);
  for (; j < cols; j += kWidth) column.template operator()<1>(j);
}

}  // namespace sluice::detail
