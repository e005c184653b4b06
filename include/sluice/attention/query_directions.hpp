// SPDX-License-Identifier: MIT
/// Calibration of Q-Filters (arXiv 2503.02812, section 3; make_filters.py): the direction in which
/// the queries of a head point, found from queries that a model forms while it reads text.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/observed_attention.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

/// Samples rotated queries of every head, evenly over all that it is shown (reservoir sampling, so
/// the same stream and seed give the same directions), and finds their main direction.
class QueryDirections {
 public:
  /// Allocates num_layers * num_qo_heads * samples * head_dim floats.
  /// \throws Error(kShape) for extents below 1 or query heads that do not divide into KV heads.
  QueryDirections(std::int64_t num_layers, std::int64_t num_qo_heads, std::int64_t num_kv_heads,
                  std::int64_t head_dim, std::int64_t samples = 3000, std::uint64_t seed = 1)
      : num_layers_(num_layers),
        num_qo_heads_(num_qo_heads),
        num_kv_heads_(num_kv_heads),
        head_dim_(head_dim),
        capacity_(samples),
        random_(seed) {
    const auto check = [](const char* field, std::int64_t value, std::int64_t most) {
      if (value < 1 || value > most)
        throw Error(ErrorCode::kShape, {"extent does not fit", "QueryDirections", field,
                                        "1 to " + std::to_string(most), std::to_string(value)});
    };
    check("num_layers", num_layers, 1 << 16);
    check("num_qo_heads", num_qo_heads, 1 << 16);
    check("num_kv_heads", num_kv_heads, num_qo_heads);
    check("head_dim", head_dim, kMaxRotaryDim);
    check("samples", samples, 1 << 24);
    if (num_qo_heads % num_kv_heads != 0)
      throw Error(ErrorCode::kShape,
                  {"query heads do not divide into KV heads", "QueryDirections", "num_qo_heads",
                   "a multiple of " + std::to_string(num_kv_heads), std::to_string(num_qo_heads)});
    seen_.resize(static_cast<std::size_t>(num_layers));
    rows_.resize(static_cast<std::size_t>(num_layers * num_qo_heads * samples * head_dim));
  }

  /// Takes in a chunk's queries. rotary: the layer's, or null.
  void observe(std::int64_t layer, const AttentionQuery& query, const Rotary* rotary) {
    SLUICE_ASSERT(layer >= 0 && layer < num_layers_ && query.rows.num_heads == num_qo_heads_);
    for (std::int64_t t = 0; t < query.rows.tokens; ++t) {
      std::int64_t& seen = seen_[static_cast<std::size_t>(layer)];
      const std::int64_t place =
          seen < capacity_
              ? seen
              : static_cast<std::int64_t>(random_.below(static_cast<std::uint64_t>(seen + 1)));
      ++seen;
      if (place >= capacity_) continue;
      float angles[kMaxRotaryDim];
      if (rotary != nullptr) rotary->angles(query.position(t), angles);
      for (std::int64_t head = 0; head < num_qo_heads_; ++head) {
        float* to = rows_.data() + ((layer * num_qo_heads_ + head) * capacity_ + place) * head_dim_;
        if (rotary != nullptr)
          rotary->rotate(angles, query.rows.head(t, head), to);
        else
          std::copy_n(query.rows.head(t, head), head_dim_, to);
      }
    }
  }

  /// The filters: of each query head minus the first right singular vector of its samples, turned
  /// so that most samples have a positive component along the vector; averaged over the query heads
  /// of a KV head. [num_layers, num_kv_heads, head_dim] \throws Error(kOrder) if a layer has not
  /// been seen.
  std::vector<float> filters() const {
    const std::int64_t group = num_qo_heads_ / num_kv_heads_;
    std::vector<float> filters(static_cast<std::size_t>(num_layers_ * num_kv_heads_ * head_dim_));
    for (std::int64_t layer = 0; layer < num_layers_; ++layer) {
      const std::int64_t samples = std::min(seen_[static_cast<std::size_t>(layer)], capacity_);
      if (samples < 1)
        throw Error(ErrorCode::kOrder, {"no queries were seen", "QueryDirections::filters",
                                        "layer " + std::to_string(layer), "at least 1", "0"});
      for (std::int64_t head = 0; head < num_qo_heads_; ++head) {
        const std::vector<double> main = main_direction(
            rows_.data() + (layer * num_qo_heads_ + head) * capacity_ * head_dim_, samples);
        float* filter = filters.data() + (layer * num_kv_heads_ + head / group) * head_dim_;
        for (std::int64_t d = 0; d < head_dim_; ++d)
          filter[d] -=
              static_cast<float>(main[static_cast<std::size_t>(d)] / static_cast<double>(group));
      }
    }
    return filters;
  }

 private:
  /// The first right singular vector of rows [samples, head_dim], the main eigenvector of their
  /// second moments, by repeated squaring of those: after k squarings the ratio of the two largest
  /// eigenvalues has grown to its 2^k-th power.
  std::vector<double> main_direction(const float* rows, std::int64_t samples) const {
    const auto dim = static_cast<std::size_t>(head_dim_);
    std::vector<double> moments(dim * dim);
    for (std::int64_t s = 0; s < samples; ++s)
      for (std::size_t i = 0; i < dim; ++i)
        for (std::size_t j = 0; j < dim; ++j)
          moments[i * dim + j] += static_cast<double>(rows[static_cast<std::size_t>(s) * dim + i]) *
                                  static_cast<double>(rows[static_cast<std::size_t>(s) * dim + j]);
    std::vector<double> squared(dim * dim);
    for (int squarings = 0; squarings < 24; ++squarings) {
      double trace = 0;
      for (std::size_t i = 0; i < dim; ++i) trace += moments[i * dim + i];
      if (trace <= 0) break;
      for (double& moment : moments) moment /= trace;
      std::fill(squared.begin(), squared.end(), 0.0);
      for (std::size_t i = 0; i < dim; ++i)
        for (std::size_t k = 0; k < dim; ++k)
          for (std::size_t j = 0; j < dim; ++j)
            squared[i * dim + j] += moments[i * dim + k] * moments[k * dim + j];
      moments.swap(squared);
    }
    // Every column is a multiple of the vector now; the longest says it best.
    std::size_t longest = 0;
    for (std::size_t i = 1; i < dim; ++i)
      if (moments[i * dim + i] > moments[longest * dim + longest]) longest = i;
    std::vector<double> main(dim);
    double squares = 0;
    for (std::size_t i = 0; i < dim; ++i) {
      main[i] = moments[i * dim + longest];
      squares += main[i] * main[i];
    }
    std::int64_t positive = 0;
    for (std::int64_t s = 0; s < samples; ++s) {
      double along = 0;
      for (std::size_t i = 0; i < dim; ++i)
        along += static_cast<double>(rows[static_cast<std::size_t>(s) * dim + i]) * main[i];
      positive += along > 0 ? 1 : 0;
    }
    const double scale = (2 * positive < samples ? -1.0 : 1.0) / std::sqrt(squares);
    for (double& x : main) x = squares > 0 ? x * scale : 0.0;
    return main;
  }

  std::int64_t num_layers_;
  std::int64_t num_qo_heads_;
  std::int64_t num_kv_heads_;
  std::int64_t head_dim_;
  std::int64_t capacity_;           // samples of a head
  std::vector<std::int64_t> seen_;  // [layers], queries shown
  std::vector<float> rows_;         // [layers, qo heads, capacity, head_dim]
  Random random_;
};

/// A cache that shows the queries of all its layers to a QueryDirections, which must outlive it.
template <RotaryElement Key, RotaryElement Value = Key>
class QueryRecordingCache : public KvCache<Key, Value> {
 public:
  QueryRecordingCache(KvCache<Key, Value>&& cache, QueryDirections& directions)
      : KvCache<Key, Value>(std::move(cache)), directions_(&directions) {}

  bool observes(std::int64_t) const { return true; }
  void observe(const ObservedAttention<Key, Value>& seen) {
    if (seen.part == 0)  // rows hold all heads
      directions_->observe(seen.layer, seen.query, this->rotary(seen.layer));
  }

 private:
  QueryDirections* directions_;
};

}  // namespace sluice
