// SPDX-License-Identifier: MIT
/// What Quest (arXiv 2406.10774) and LServe (arXiv 2502.14866) choose pages of a cache by: the
/// largest and smallest value of each channel among a page's keys bound every score of the page
/// from above.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

/// sum_d max(query_d maxima_d, query_d minima_d), at least query . key of any key between the two
/// (in real numbers; float32 sums round). All: [dim].
template <RotaryElement Key>
float page_bound(const float* query, const Key* maxima, const Key* minima, std::int64_t dim) {
  simd::VecF sum = simd::zero();
  std::int64_t d = 0;
  for (; d + simd::kWidth <= dim; d += simd::kWidth) {
    const simd::VecF q = simd::load(query + d);
    sum += simd::max(q * simd::load(maxima + d), q * simd::load(minima + d));
  }
  float bound = simd::reduce_add(sum);
  for (; d < dim; ++d)
    bound += std::max(query[d] * static_cast<float>(maxima[d]),
                      query[d] * static_cast<float>(minima[d]));
  return bound;
}

/// Marks the numbers of the `most` highest of `scores`, ascending, in `order`, whose first entries
/// they become; ties go to the lower number, a NaN is the lowest. scores: [count], order: [count or
/// more]. Returns min(most, count). O(count) on average. Allocates nothing.
inline std::int64_t pick_highest(std::span<const float> scores, std::int64_t most,
                                 std::span<std::int64_t> order) {
  const auto count = static_cast<std::int64_t>(scores.size());
  const auto value = [&](std::int64_t i) {
    const float score = scores[static_cast<std::size_t>(i)];
    return std::isnan(score) ? -std::numeric_limits<float>::infinity() : score;
  };
  const auto begin = order.begin();
  for (std::int64_t i = 0; i < count; ++i) begin[i] = i;
  const std::int64_t picked = std::max<std::int64_t>(0, std::min(most, count));
  if (picked < count)
    std::nth_element(begin, begin + picked, begin + count, [&](std::int64_t a, std::int64_t b) {
      const float x = value(a);
      const float y = value(b);
      return x != y ? x > y : a < b;
    });
  std::sort(begin, begin + picked);
  return picked;
}

/// The pages that are read: the newest, which is the last, and the budget - 1 best of the others;
/// all of them where there are at most `budget`. As pick_highest(). Precondition: budget >= 1.
inline std::int64_t pick_pages(std::span<const float> scores, std::int64_t budget,
                               std::span<std::int64_t> order) {
  if (scores.empty()) return 0;
  const std::int64_t others = pick_highest(scores.first(scores.size() - 1), budget - 1, order);
  order[static_cast<std::size_t>(others)] = static_cast<std::int64_t>(scores.size()) - 1;
  return others + 1;
}

/// Channel-wise maxima and minima of the keys of each page, for some heads: [heads, pages, 2, dim],
/// in the keys' own type and so exact. Only construction allocates.
template <RotaryElement Key>
class PageBounds {
 public:
  /// Rows: tokens that it can be asked for. \throws std::bad_alloc.
  PageBounds(std::int64_t num_heads, std::int64_t rows, std::int64_t page_size, std::int64_t dim)
      : num_heads_(num_heads),
        pages_((rows + page_size - 1) / page_size),
        page_size_(page_size),
        dim_(dim),
        bounds_(static_cast<std::size_t>(num_heads * pages_ * 2 * dim)) {}

  std::size_t bytes() const { return bounds_.bytes(); }
  std::int64_t page_size() const { return page_size_; }
  /// Rows that the bounds know.
  std::int64_t rows() const { return rows_; }
  const Key* maxima(std::int64_t head, std::int64_t page) const {
    return bounds_.data() + (head * pages_ + page) * 2 * dim_;
  }
  const Key* minima(std::int64_t head, std::int64_t page) const {
    return maxima(head, page) + dim_;
  }

  /// Takes in rows() .. rows - 1. keys: of row 0 in head 0, strides in elements.
  void extend(const Key* keys, std::int64_t head_stride, std::int64_t row_stride,
              std::int64_t rows) {
    for (std::int64_t head = 0; head < num_heads_; ++head)
      for (std::int64_t row = rows_; row < rows; ++row)
        widen(head, row, keys + head * head_stride + row * row_stride);
    rows_ = std::max(rows_, rows);
  }
  /// Only the first `rows` rows are left. A page that loses some is forgotten whole: extend() forms
  /// its bounds anew, so that they are those of a run that never went on.
  void truncate(std::int64_t rows) {
    if (rows < rows_) rows_ = rows / page_size_ * page_size_;
  }

 private:
  void widen(std::int64_t head, std::int64_t row, const Key* key) {
    Key* const most = bounds_.data() + (head * pages_ + row / page_size_) * 2 * dim_;
    Key* const least = most + dim_;
    if (row % page_size_ == 0) {
      std::copy_n(key, dim_, most);
      std::copy_n(key, dim_, least);
      return;
    }
    for (std::int64_t d = 0; d < dim_; ++d) {
      const auto value = static_cast<float>(key[d]);
      if (value > static_cast<float>(most[d])) most[d] = key[d];
      if (value < static_cast<float>(least[d])) least[d] = key[d];
    }
  }

  std::int64_t num_heads_;
  std::int64_t pages_;
  std::int64_t page_size_;
  std::int64_t dim_;
  std::int64_t rows_ = 0;
  Buffer<Key> bounds_;  // [heads, pages, 2, dim]
};

}  // namespace sluice
