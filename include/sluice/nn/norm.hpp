// SPDX-License-Identifier: MIT
/// Root-mean-square normalisation (arXiv 1910.07467) of rows and of heads.
#pragma once

#include <cmath>
#include <cstdint>

#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/view.hpp"

namespace sluice {

namespace detail {

void rms_norm_row(const float* x, const float* weight, std::int64_t count, float eps,
                  bool add_one_to_weight, float* y);

#if SLUICE_KERNELS_INCLUDED
// The sum of squares in float64 over float32 sums of at most 16 products a lane, so that its error
// stays near one rounding whatever the length.
inline double sum_of_squares(const float* x, std::int64_t count) {
  constexpr std::int64_t kStrip = 16 * simd::kWidth;
  double total = 0.0;
  std::int64_t i = 0;
  while (i < count) {
    const std::int64_t end = i + kStrip < count ? i + kStrip : count;
    simd::VecF sum = simd::zero();
    for (; i + simd::kWidth <= end; i += simd::kWidth) {
      const simd::VecF value = simd::load(x + i);
      sum = simd::fma(value, value, sum);
    }
    if (i < end) {
      const simd::VecF value = simd::load_partial(x + i, end - i);
      sum = simd::fma(value, value, sum);
      i = end;
    }
    total += static_cast<double>(simd::reduce_add(sum));
  }
  return total;
}

SLUICE_KERNEL void rms_norm_row(const float* x, const float* weight, std::int64_t count, float eps,
                                bool add_one_to_weight, float* y) {
  const double mean = sum_of_squares(x, count) / static_cast<double>(count);
  const simd::VecF scale =
      simd::broadcast(static_cast<float>(1.0 / std::sqrt(mean + static_cast<double>(eps))));
  const simd::VecF offset = simd::broadcast(add_one_to_weight ? 1.0F : 0.0F);
  std::int64_t i = 0;
  for (; i + simd::kWidth <= count; i += simd::kWidth)
    simd::store(y + i, simd::load(x + i) * scale * (simd::load(weight + i) + offset));
  if (i < count) {
    const std::int64_t rest = count - i;
    const simd::VecF factor = simd::load_partial(weight + i, rest) + offset;
    simd::store_partial(y + i, simd::load_partial(x + i, rest) * scale * factor, rest);
  }
}
#endif

}  // namespace detail

/// y[t, c] = x[t, c] / sqrt(mean over c of x[t, c]^2 + eps) * weight[c], or * (1 + weight[c]) if
/// `add_one_to_weight` is set, as Gemma stores its weights (GGUF files have the one added already).
/// x, y: [tokens, cols], which may be the same memory but may not overlap otherwise; weight:
/// [cols]. The mean is float64, all else float32: each output is within 4 roundings of the exact
/// value. A row of zeros gives zeros if eps > 0. Allocates nothing.
inline void rms_norm(MatrixView<const float> x, const float* weight, float eps, MatrixView<float> y,
                     bool add_one_to_weight = false) {
  SLUICE_ASSERT(x.rows == y.rows && x.cols == y.cols);
  for (std::int64_t t = 0; t < x.rows; ++t)
    detail::rms_norm_row(x.row(t), weight, x.cols, eps, add_one_to_weight, y.row(t));
}

/// The same over every head by itself, in place: the query and key normalisation of Qwen3 and
/// Gemma 3. x: [tokens, num_heads, head_dim]; weight: [head_dim], shared by all heads.
inline void rms_norm_heads(HeadsView<float> x, const float* weight, float eps,
                           bool add_one_to_weight = false) {
  for (std::int64_t t = 0; t < x.tokens; ++t)
    for (std::int64_t h = 0; h < x.num_heads; ++h)
      detail::rms_norm_row(x.head(t, h), weight, x.head_dim, eps, add_one_to_weight, x.head(t, h));
}

}  // namespace sluice
